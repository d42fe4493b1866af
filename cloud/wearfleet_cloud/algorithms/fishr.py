"""Fishr: equal variance of the classifier's gradients in all source domains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.algorithms.base import CORRECTED, MODES, Algorithm, AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.losses import accuracy, domain_risks
from wearfleet_cloud.algorithms.passes import embed, head, pooled
from wearfleet_cloud.algorithms.penalised import STEP, Losses, Penalised, annealed, count_step
from wearfleet_cloud.kernels.gradient_variance import fishr_penalty, gradient_variance, moving_variance

__all__ = ["AVERAGE", "Fishr"]

AVERAGE = "fishr/average"
"""Buffer (D, K, F + 1): moving average of the variances of every domain, not corrected for its start at 0."""


@dataclass(frozen=True, slots=True)
class Fishr(Penalised):
    """L = mean of the domain risks + w * mean over domains and entries of (u_d - mean u)^2, one joint pass.

    e_d <- ema e_d + (1 - ema) v_d, where v_d is the variance over the windows of domain d of the gradient of the
    cross-entropy by the head, and the past has no gradient. w is 0 in the first ``anneal_steps`` steps and ``lam``
    after them; the optimiser starts anew where it changes. Mode "corrected": u = e / (1 - ema^t), the average of
    the variances seen. Mode "strict": u = e / (1 - ema), which grows to 1 / (1 - ema) times that (pitfall P14), so
    that the slope of the penalty becomes (1 - ema)^-2 times as large, 400 times for 0.95.

    Source: Rame et al. 2022, arXiv:2109.02934, equation 5 and section 3.3; specs/ood.md 2.14,
    ``kernels/gradient_variance`` for v and the distance.
    Differs: both modes use the optimiser of the run, where the published code makes an Adam of its own.

    Raises:
        ConfigError: unknown mode.
    """

    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="fishr",
        title="Fishr",
        paper="Rame et al. 2022, arXiv:2109.02934",
        family="invariance",
        needs=("domain labels", "per-sample gradients"),
        forward="joint",
        inference="backbone + head",
        hyper={"lam": 1000.0, "anneal_steps": 1500.0, "ema": 0.95},
        options={"mode": MODES},
    )

    def __post_init__(self) -> None:
        Algorithm.__post_init__(self)
        if self.mode not in MODES:
            raise ConfigError(f"mode of fishr must be {' or '.join(MODES)}, got {self.mode!r}")

    def init(self, seed: int = 0) -> State:
        """As ``Algorithm.init``, with the count of steps and averages of 0."""
        state, (classes, width) = Penalised.init(self, seed), self.model.head.weight.shape
        zeros = self.model.head.weight.new_zeros((self.domains, classes, width + 1)).detach()
        return state._replace(buffers={**state.buffers, STEP: zeros.new_zeros(()), AVERAGE: zeros})

    def weight(self, state: State, hyper: Mapping[str, Tensor]) -> Tensor:
        """As ``Penalised.weight``."""
        return annealed(state, hyper["anneal_steps"], torch.zeros_like(hyper["lam"]), hyper["lam"])[0]

    def ready(self, state: State, hyper: Mapping[str, Tensor]) -> State:
        """As ``Penalised.ready``: the optimiser starts anew where the weight changes."""
        return annealed(state, hyper["anneal_steps"], torch.zeros_like(hyper["lam"]), hyper["lam"])[1]

    def losses(
        self, params: Tensors, buffers: Tensors, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> Losses:
        """As ``Penalised.losses``."""
        x, _, weight = pooled(batch)
        flat, after = embed(self.model, params, buffers, x, weight, rng)
        features = flat.reshape(*batch.y.shape, -1)
        logits = head(params, features)
        risk = domain_risks(logits, batch.y, batch.weight).mean()
        variances = gradient_variance(features, logits, batch.y, batch.weight)
        average = moving_variance(buffers[AVERAGE], variances, hyper["ema"])
        after = {**count_step(after), AVERAGE: average}
        filled = 1.0 - hyper["ema"] ** (after[STEP] if self.mode == CORRECTED else 1.0)
        metrics = {"accuracy": accuracy(logits, batch.y, batch.weight)}
        return Losses(risk, fishr_penalty(average / filled), metrics, after)
