"""VREx: equal risks in all source domains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wearfleet_cloud.algorithms.base import AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.losses import accuracy, domain_risks
from wearfleet_cloud.algorithms.passes import call, pooled
from wearfleet_cloud.algorithms.penalised import STEP, Losses, Penalised, annealed, count_step

__all__ = ["VREx"]


@dataclass(frozen=True, slots=True)
class VREx(Penalised):
    """L = mean of the domain risks R_d + w * mean_d (R_d - mean R)^2, all domains normalised together.

    w is 1 (not 0: pitfall P11) in the first ``anneal_steps`` steps and ``lam`` after them; the optimiser starts
    anew where it changes.

    Source: Krueger et al. 2021, arXiv:2003.00688, definition of R_V-REx; specs/ood.md 2.7.
    Differs: averages the risks where the paper sums them; so our weight is the paper's divided by the number of
    domains. ``lam`` is 10 as in DomainBed; HAROOD's 1 makes the change of weight no change.
    """

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="vrex",
        title="VREx",
        paper="Krueger et al. 2021, arXiv:2003.00688",
        family="invariance",
        needs=("domain labels",),
        forward="joint",
        inference="backbone + head",
        hyper={"lam": 10.0, "anneal_steps": 500.0},
        options={},
    )

    def init(self, seed: int = 0) -> State:
        """As ``Algorithm.init``, with the count of steps."""
        state = Penalised.init(self, seed)
        return state._replace(
            buffers={**state.buffers, STEP: torch.zeros((), device=self.model.head.weight.device)}
        )

    def weight(self, state: State, hyper: Mapping[str, Tensor]) -> Tensor:
        """As ``Penalised.weight``."""
        return annealed(state, hyper["anneal_steps"], torch.ones_like(hyper["lam"]), hyper["lam"])[0]

    def ready(self, state: State, hyper: Mapping[str, Tensor]) -> State:
        """As ``Penalised.ready``: the optimiser starts anew where the weight changes."""
        return annealed(state, hyper["anneal_steps"], torch.ones_like(hyper["lam"]), hyper["lam"])[1]

    def losses(
        self, params: Tensors, buffers: Tensors, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> Losses:
        """As ``Penalised.losses``."""
        x, _, weight = pooled(batch)
        flat, after = call(self.model, params, buffers, x, weight, rng)
        logits = flat.reshape(*batch.y.shape, -1)
        risks = domain_risks(logits, batch.y, batch.weight)
        metrics = {"accuracy": accuracy(logits, batch.y, batch.weight)}
        return Losses(risks.mean(), risks.var(correction=0), metrics, count_step(after))
