"""Mixup-guided optimisation: windows mixed across domains decide how risk and penalty are weighed in each step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final

import torch
from torch import Tensor
from wearfleet_models import ModelSpec, randomness

from wearfleet_cloud.algorithms.affar import Affar
from wearfleet_cloud.algorithms.base import (
    Algorithm,
    AlgorithmInfo,
    Batch,
    State,
    Tensors,
    TrainingWindows,
)
from wearfleet_cloud.algorithms.coral import Coral
from wearfleet_cloud.algorithms.dann import Dann
from wearfleet_cloud.algorithms.difex import Difex
from wearfleet_cloud.algorithms.fishr import Fishr
from wearfleet_cloud.algorithms.gradients import gradients, update
from wearfleet_cloud.algorithms.lag import Lag
from wearfleet_cloud.algorithms.mixup import Mixed, mix
from wearfleet_cloud.algorithms.mmd import Mmd
from wearfleet_cloud.algorithms.one_domain import reordered
from wearfleet_cloud.algorithms.passes import call
from wearfleet_cloud.algorithms.penalised import Penalised
from wearfleet_cloud.algorithms.vrex import VREx
from wearfleet_cloud.kernels.soft_cross_entropy import soft_cross_entropy

__all__ = ["METHODS", "Guided", "pareto_share"]

METHODS: Final[Mapping[str, type[Penalised]]] = {
    "coral": Coral,
    "mmd": Mmd,
    "vrex": VREx,
    "fishr": Fishr,
    "dann": Dann,
    "lag": Lag,
    "difex": Difex,
    "affar": Affar,
}
"""What can be guided: each with its default options and hyper-parameters (but DIFEX's ``teacher_steps``)."""
_GUIDE = 7_000
_CIRCLE, _LAMBDA = 0, 1


@dataclass(frozen=True, slots=True)
class Guided(Algorithm):
    """Step along w g1 + (1 - w) g2: gradients of risk and penalty of another method, weighed anew in each step.

    gg is the gradient of the cross-entropy on mixtures of windows of different domains, an imitation of unseen ones.
    w in [0, 1] maximises gg . v(w) among the directions v(w) = w g1 + (1 - w) g2 that worsen neither risk nor penalty
    to first order; :func:`pareto_share` solves it. All products are those of the parameters up to the head. The head,
    and what only training needs, belong to one objective each and take g1 + g2.

    Source: Lu et al. 2023, "Towards optimization and model selection for domain generalization: a Mixup-guided
    solution", PMLR 218, arXiv:2209.00652; specs/ood.md 3.8.
    Differs: a reconstruction. The paper's code is not published and its exact problem was not at hand: the objective,
    its closed form and what the head does are ours. The method's own weight of the whole penalty, and its annealing,
    are not used (weights of terms within it are); statistics run over the method's pass only.
    """

    method: str = "coral"
    inner: Penalised = field(init=False, repr=False)
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="guided",
        title="Mixup-guided (reconstruction)",
        paper="Lu et al. 2023, arXiv:2209.00652 (reconstruction)",
        family="multi-objective",
        needs=("domain labels", "full pass"),
        forward="per-domain",
        inference="backbone + head",
        hyper={"concentration": 0.2, "teacher_steps": Difex.info.hyper["teacher_steps"]},
        options={"method": tuple(METHODS)},
    )

    def __post_init__(self) -> None:
        Algorithm.__post_init__(self)
        method = METHODS[self.method](self.model, self.optimiser, self.domains)
        object.__setattr__(self, "inner", method)

    @classmethod
    def network(cls, spec: ModelSpec, domains: int, options: Mapping[str, str]) -> ModelSpec:
        """As ``Algorithm.network``: that of the method."""
        return METHODS[options.get("method", "coral")].network(spec, domains, {})

    def init(self, seed: int = 0) -> State:
        """As ``Algorithm.init``: that of the method."""
        return self.inner.init(seed)

    def refresh_at(self, number: int, pass_steps: int) -> bool:
        """As ``Algorithm.refresh_at``: when the method's comes."""
        return self.inner.refresh_at(number, pass_steps)

    def refresh(self, state: State, data: TrainingWindows, hyper: Mapping[str, Tensor], rng: Tensor) -> State:
        """As ``Algorithm.refresh``: that of the method."""
        return self.inner.refresh(state, data, self._with_defaults(hyper), rng)

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss" (the risk), "penalty", "guide" (on mixtures), "share" w, "accuracy"."""
        mixed = _across_domains(batch, hyper["concentration"], randomness.derive(rng, _GUIDE))
        given = self._with_defaults(hyper)

        def objectives(
            params: Tensors, buffers: Tensors
        ) -> tuple[tuple[Tensor, ...], tuple[Tensors, Tensors]]:
            found = self.inner.losses(params, buffers, batch, given, rng)
            guide = self._guide(params, buffers, mixed, randomness.derive(rng, _GUIDE + 1))
            return (found.risk, found.penalty, guide), (found.metrics, found.buffers)

        grads, losses, metrics, buffers = gradients(objectives, state)
        shared = [name for name in grads if "/" not in name and not name.startswith("head.")]
        rows = torch.cat([grads[name].flatten(1) for name in shared], dim=1)
        share = pareto_share(rows @ rows.T)
        step = {
            n: share * g[0] + (1.0 - share) * g[1] if n in shared else g[0] + g[1] for n, g in grads.items()
        }
        after = update(state._replace(buffers=buffers), step, self.optimiser, hyper["lr"])
        named = {"loss": losses[0], "penalty": losses[1], "guide": losses[2], "share": share}
        return after, {**metrics, **named}

    def _with_defaults(self, hyper: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The hyper-parameters, with those of the method beside them."""
        defaults = {n: torch.full_like(hyper["lr"], v) for n, v in self.inner.info.hyper.items()}
        return {**defaults, **hyper}

    def _guide(self, params: Tensors, buffers: Tensors, mixed: Mixed, rng: Tensor) -> Tensor:
        """() cross-entropy on mixtures, normalised together."""
        weight = None if mixed.weight is None else mixed.weight.flatten()
        logits, _ = call(self.model, params, buffers, mixed.x.flatten(0, 1), weight, rng)
        logits = logits.reshape(*mixed.y.shape, -1)
        return soft_cross_entropy(
            logits, mixed.y, other=mixed.other, share=mixed.lam, weight=mixed.weight
        ).mean()


def pareto_share(products: Tensor) -> Tensor:
    """Weight w of the first gradient in v(w) = w g1 + (1 - w) g2, of all that is safe the one the guide likes most.

    Maximises gg . v(w) over w in [0, 1] with g1 . v(w) >= 0 and g2 . v(w) >= 0. With a = g1 . g2 < 0 these hold for
    w >= -a / (|g1|^2 - a) and w <= |g2|^2 / (|g2|^2 - a), otherwise everywhere; gg . v is linear in w, so one end is
    best. Where even that end has gg . v <= 0 the shortest v(w) is taken: w = (g2 - g1) . g2 / |g1 - g2|^2, clipped.

    Args:
        products: (3, 3) dot products of g1, g2 and gg.

    Returns:
        () in [0, 1].

    Source: specs/ood.md 3.8; shortest vector: Desideri 2012, C. R. Math. 350 (MGDA).
    """
    tiny = torch.finfo(products.dtype).tiny
    first, second, both = products[0, 0], products[1, 1], products[0, 1]
    conflict = (-both).clamp(min=0.0)
    low = conflict / (first + conflict).clamp(min=tiny)
    high = 1.0 - conflict / (second + conflict).clamp(min=tiny)
    towards_first, towards_second = products[2, 0], products[2, 1]
    best = torch.where(towards_first >= towards_second, high, low)
    gain = best * towards_first + (1.0 - best) * towards_second
    shortest = ((second - both) / (first + second - 2.0 * both).clamp(min=tiny)).clamp(0.0, 1.0)
    return torch.where(gain > 0.0, best, shortest)


def _across_domains(batch: Batch, concentration: Tensor, rng: Tensor) -> Mixed:
    """Every domain mixed, window by window, with the next of a random circle of domains."""
    domains = batch.y.shape[0]
    circle = randomness.permutation(rng, _CIRCLE, domains)
    lam = torch.stack([randomness.beta(rng, _LAMBDA + pair, concentration) for pair in range(domains)])
    return mix(reordered(batch, circle), reordered(batch, circle.roll(-1)), lam)
