"""MLDG: after a trial step on one domain, another domain should be better off too."""

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
from wearfleet_cloud.algorithms.gradients import gradient, update
from wearfleet_cloud.algorithms.one_domain import reordered, risk_of
from wearfleet_cloud.training.optimisers import Sgd

__all__ = ["Mldg"]

_ORDER = 1_000


@dataclass(frozen=True, slots=True)
class Mldg(Algorithm):
    """Step along 1/D sum_(i,j) g_i(theta) + beta g_j(theta'), theta' one trial step from theta along g_i.

    (i, j) are the neighbours in a random circle of the domains; every pass is normalised by its own batch. First order:
    the second gradient is not differentiated through the trial step.

    Source: Li et al. 2018, arXiv:1710.03463, algorithm 1; specs/ood.md 2.9.
    Differs: mode "corrected" makes the trial step theta - inner_lr g_i, as the paper does, and the running statistics
    see every domain once at theta. The published code (mode "strict") makes it with the optimiser of training from
    empty slots, which for Adam is about inner_lr whatever the gradient, and never moves the running statistics, so
    that evaluation normalises by mean 0 and variance 1.
    """

    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="mldg",
        title="MLDG",
        paper="Li et al. 2018, arXiv:1710.03463",
        family="meta-learning",
        needs=("domain labels", "per-domain gradients"),
        forward="per-domain",
        inference="backbone + head",
        hyper={"beta": 1.0, "inner_lr": 0.01},
        options={"mode": MODES},
    )

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss", its terms "first" and "second", and "accuracy"."""
        domains, beta = batch.y.shape[0], hyper["beta"]
        keys = randomness.derive(rng, torch.arange(2 * domains, device=rng.device))
        order = randomness.permutation(rng, _ORDER, domains)
        first, second = reordered(batch, order), reordered(batch, order.roll(-1))
        sums = {name: torch.zeros_like(p) for name, p in state.params.items()}
        losses, rights, seen = [], [], state
        for pair in range(domains):
            risk = risk_of(self.model, first, pair, keys[2 * pair])
            here, loss, metrics, buffers = gradient(risk, seen)
            seen = state._replace(buffers=buffers)
            trial = self._trial(state, here, hyper["inner_lr"])
            there, after, _, _ = gradient(risk_of(self.model, second, pair, keys[2 * pair + 1]), trial)
            sums = {name: total + here[name] + beta * there[name] for name, total in sums.items()}
            losses.append(torch.stack([loss, after]))
            rights.append(metrics["accuracy"])
        start = seen if self.mode == CORRECTED else state
        moved = update(start, {n: t / domains for n, t in sums.items()}, self.optimiser, hyper["lr"])
        one, two = torch.stack(losses).mean(dim=0).unbind()
        right = torch.stack(rights).mean()
        return moved, {"loss": one + beta * two, "first": one, "second": two, "accuracy": right}

    def _trial(self, state: State, grads: Tensors, lr: Tensor) -> State:
        """The state after the trial step."""
        if self.mode == CORRECTED:
            return update(state, grads, Sgd(), lr)
        return update(state._replace(slots=self.optimiser.init(state.params)), grads, self.optimiser, lr)
