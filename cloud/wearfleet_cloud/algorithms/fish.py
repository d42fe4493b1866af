"""Fish: step from domain to domain, then go part of the way; that favours what the domains' gradients share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from wearfleet_models import randomness

from wearfleet_cloud.algorithms.base import (
    CORRECTED,
    MODES,
    Algorithm,
    AlgorithmInfo,
    Batch,
    State,
    Tensors,
)
from wearfleet_cloud.algorithms.gradients import descend
from wearfleet_cloud.algorithms.one_domain import reordered, risk_of

__all__ = ["Fish"]

_ORDER = 1_000


@dataclass(frozen=True, slots=True)
class Fish(Algorithm):
    """theta <- theta + epsilon (theta' - theta), theta' after one optimiser step on every domain in turn.

    The optimiser's slots go on from step to step. ``lr`` is that of the inner steps.

    Source: Shi et al. 2022, arXiv:2104.09937, algorithm 1; specs/ood.md 2.13.
    Differs: mode "corrected" takes the domains in a new random order each step, as the paper does, and the running
    statistics of theta'. The published code (mode "strict") keeps the order and moves the statistics by epsilon too,
    so that early ones are those of no data. Both report loss and accuracy of all domains, not of the last.
    """

    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="fish",
        title="Fish",
        paper="Shi et al. 2022, arXiv:2104.09937",
        family="gradient agreement",
        needs=("domain labels", "per-domain gradients"),
        forward="per-domain",
        inference="backbone + head",
        hyper={"epsilon": 0.1},
        options={"mode": MODES},
    )

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss" and "accuracy", means over the inner steps."""
        domains = batch.y.shape[0]
        keys = randomness.derive(rng, torch.arange(domains, device=rng.device))
        if self.mode == CORRECTED:
            batch = reordered(batch, randomness.permutation(rng, _ORDER, domains))
        inner, found = state, []
        for domain in range(domains):
            objective = risk_of(self.model, batch, domain, keys[domain])
            inner, metrics = descend(objective, inner, self.optimiser, hyper["lr"])
            found.append(metrics)
        share = hyper["epsilon"]
        params = _towards(state.params, inner.params, share)
        buffers = inner.buffers if self.mode == CORRECTED else _towards(state.buffers, inner.buffers, share)
        means = {name: torch.stack([metrics[name] for metrics in found]).mean() for name in found[0]}
        return inner._replace(params=params, buffers=buffers), means


def _towards(start: Tensors, end: Tensors, share: Tensor) -> Tensors:
    """A share of the way from one set of tensors to another; whole numbers are rounded."""
    moved = {name: t + share * (end[name] - t) for name, t in start.items()}
    return {
        name: t if start[name].is_floating_point() else t.round().to(start[name].dtype)
        for name, t in moved.items()
    }
