"""GroupDRO: weigh the source domains by how hard they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wearfleet_cloud.algorithms.base import Algorithm, AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.gradients import descend
from wearfleet_cloud.algorithms.losses import accuracy, domain_risks
from wearfleet_cloud.algorithms.passes import features_of_domains

__all__ = ["LOG_SHARES", "GroupDRO"]

LOG_SHARES = "group_dro/log_shares"
"""Buffer (D,): ln q."""


@dataclass(frozen=True, slots=True)
class GroupDRO(Algorithm):
    """q_d <- q_d exp(eta R_d) / sum; L = sum_d q_d R_d, every domain normalised by its own batch statistics.

    The shares q of the domains are part of the state, so a run that is resumed goes on with them.

    Source: Sagawa et al. 2020, arXiv:1911.08731, algorithm 1; specs/ood.md 2.11.
    Differs: every batch has windows of all domains, so all shares move in each step (as DomainBed and HAROOD do);
    keeps ln q, in which no share underflows to 0 and stays there. ``eta`` is 0.01 as in DomainBed and in the paper;
    HAROOD's 1 puts all weight on one domain within tens of steps (pitfall P12).
    """

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="group-dro",
        title="GroupDRO",
        paper="Sagawa et al. 2020, arXiv:1911.08731",
        family="robust optimisation",
        needs=("domain labels",),
        forward="per-domain",
        inference="backbone + head",
        hyper={"eta": 0.01},
        options={},
    )

    def init(self, seed: int = 0) -> State:
        """As ``Algorithm.init``, with equal shares."""
        state = Algorithm.init(self, seed)
        shares = torch.full((self.domains,), 1.0 / self.domains, device=self.model.head.weight.device)
        return state._replace(buffers={**state.buffers, LOG_SHARES: shares.log()})

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss", "risk" (the plain mean), "hardest" (the largest q) and "accuracy"."""

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            _, logits, after = features_of_domains(self.model, params, buffers, batch, rng)
            risks = domain_risks(logits, batch.y, batch.weight)
            log_shares = torch.log_softmax(buffers[LOG_SHARES] + hyper["eta"] * risks.detach(), dim=0)
            shares = log_shares.exp()
            metrics = {
                "risk": risks.mean(),
                "hardest": shares.max(),
                "accuracy": accuracy(logits, batch.y, batch.weight),
            }
            return (shares * risks).sum(), (metrics, {**after, LOG_SHARES: log_shares})

        return descend(objective, state, self.optimiser, hyper["lr"])
