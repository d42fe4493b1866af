"""Mixup: train on convex combinations of pairs of windows and of their labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from wearfleet_models import randomness
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.algorithms.base import Algorithm, AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.gradients import descend
from wearfleet_cloud.algorithms.losses import mixed_accuracy, mixed_risk
from wearfleet_cloud.algorithms.passes import call, pooled

__all__ = ["Mixed", "Mixup", "mix"]

_PARTNERS, _LAMBDA = 1_000, 1_001


class Mixed(NamedTuple):
    """Windows mixed in pairs.

    Args:
        x: (G, B, C, T) lam x_i + (1 - lam) x_j.
        y: (G, B) label of the first of a pair.
        other: (G, B) label of the second.
        lam: (G,) share of the first, one a group.
        weight: (G, B) product of the two weights, or None.
    """

    x: Tensor
    y: Tensor
    other: Tensor
    lam: Tensor
    weight: Tensor | None


@dataclass(frozen=True, slots=True)
class Mixup(Algorithm):
    """L = lam CE(f(x_mixed), y_i) + (1 - lam) CE(f(x_mixed), y_j), lam ~ Beta(alpha, alpha).

    Pairing "batch": one lam a step, partners by a random order of all windows of all domains, joint
    statistics (HAROOD). Pairing "domain": every domain is mixed with the next in a random circle of
    domains, each pair of domains with its own lam and its own batch statistics (DomainBed).

    Source: Zhang et al. 2018, arXiv:1710.09412, equation 1; specs/ood.md 2.2.

    Raises:
        ConfigError: unknown pairing.
    """

    pairing: str = "batch"
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="mixup",
        title="Mixup",
        paper="Zhang et al. 2018, arXiv:1710.09412",
        family="augmentation",
        needs=(),
        forward="joint",
        inference="backbone + head",
        hyper={"alpha": 0.2},
        options={"pairing": ("batch", "domain")},
    )

    def __post_init__(self) -> None:
        Algorithm.__post_init__(self)
        if self.pairing not in self.info.options["pairing"]:
            raise ConfigError(f"pairing of mixup must be batch or domain, got {self.pairing!r}")

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss" and "accuracy" (the latter weighs both labels of a pair)."""
        mixed = self._pairs(batch, hyper["alpha"], rng)
        groups = mixed.y.shape[0]
        keys = randomness.derive(rng, torch.arange(groups, device=rng.device))

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            loss, right = torch.zeros((), device=mixed.x.device), torch.zeros((), device=mixed.x.device)
            for group in range(groups):
                weight = None if mixed.weight is None else mixed.weight[group]
                logits, buffers = call(self.model, params, buffers, mixed.x[group], weight, keys[group])
                y, other, share = mixed.y[group], mixed.other[group], mixed.lam[group]
                loss = loss + mixed_risk(logits, y, other, share, weight)
                right = right + mixed_accuracy(logits, y, other, share, weight)
            return loss / groups, ({"accuracy": right / groups}, buffers)

        return descend(objective, state, self.optimiser, hyper["lr"])

    def _pairs(self, batch: Batch, alpha: Tensor, rng: Tensor) -> Mixed:
        if self.pairing == "batch":
            x, y, weight = pooled(batch)
            one = Batch(x[None], y[None], None if weight is None else weight[None])
            order = randomness.permutation(rng, _PARTNERS, y.shape[0])
            return mix(one, _take(one, order, axis=1), randomness.beta(rng, _LAMBDA, alpha)[None])
        domains = batch.y.shape[0]
        circle = randomness.permutation(rng, _PARTNERS, domains)
        lam = torch.stack([randomness.beta(rng, _LAMBDA + pair, alpha) for pair in range(domains)])
        return mix(_take(batch, circle, axis=0), _take(batch, circle.roll(-1), axis=0), lam)


def mix(first: Batch, second: Batch, lam: Tensor) -> Mixed:
    """Combine two batches window by window.

    Args:
        first: (G, B) windows.
        second: their partners.
        lam: (G,) share of ``first``.

    Returns:
        The mixture; a pair with a window of weight 0 has weight 0.
    """
    share = lam[:, None, None, None]
    x = share * first.x + (1.0 - share) * second.x
    weight = None if first.weight is None or second.weight is None else first.weight * second.weight
    return Mixed(x, first.y, second.y, lam, weight)


def _take(batch: Batch, order: Tensor, axis: int) -> Batch:
    weight = None if batch.weight is None else batch.weight.index_select(axis, order)
    return Batch(batch.x.index_select(axis, order), batch.y.index_select(axis, order), weight)
