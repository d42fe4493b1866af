"""Every public operation once, small: what holds for all of them is tested over this list.

A call takes tensors that it differentiates and returns one tensor; its other arguments are fixed and follow the first
tensor's device (and, where they are float, its dtype).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from wearfleet_cloud.kernels.contrastive import multi_positive, pairwise_sigmoid, supervised_contrastive
from wearfleet_cloud.kernels.coral import coral_penalty
from wearfleet_cloud.kernels.distillation import distillation
from wearfleet_cloud.kernels.gradient_variance import gradient_variance
from wearfleet_cloud.kernels.margin import additive_angular, large_margin, large_margin_softmax
from wearfleet_cloud.kernels.mmd import mmd
from wearfleet_cloud.kernels.robust import (
    clip_factors,
    coordinate_median,
    squared_distances,
    squared_norms,
    trimmed_mean,
    weighted_mean,
)
from wearfleet_cloud.kernels.sinkhorn import group_lasso_plan, transport_loss, transport_plan
from wearfleet_cloud.kernels.soft_cross_entropy import soft_cross_entropy


@dataclass(frozen=True)
class Call:
    """One way to call an operation.

    Args:
        name: package of the operation and form.
        function: of the differentiable tensors.
        shapes: of these tensors.
        differentiable: whether the result has gradients.
        rounding: what products in bfloat16, which belong to the library, may change of result and gradients.
    """

    name: str
    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    differentiable: bool = True
    rounding: float = 0.0

    @property
    def package(self) -> str:
        """Folder of the operation."""
        return self.name.partition("/")[0]

    def leaves(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """Its differentiable tensors, on the CPU; of values that bfloat16 can hold, so that all types see the same."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(*shape, generator=generator).bfloat16() for shape in self.shapes]
        return [leaf.to(dtype) for leaf in drawn]


def _labels(like: Tensor, *shape: int, classes: int = 3) -> Tensor:
    """Whole numbers that look like any, without 0 ... classes - 1 in turn."""
    numbers = torch.arange(torch.Size(shape).numel(), device=like.device)
    return (numbers * 7 // 3 % classes).reshape(shape)


def _ramp(like: Tensor, *shape: int) -> Tensor:
    """Positive numbers in the dtype of another tensor, float32 for bfloat16."""
    wide = torch.promote_types(like.dtype, torch.float32)
    count = torch.Size(shape).numel()
    return (0.5 + torch.arange(count, device=like.device, dtype=wide) / count).reshape(shape)


def _scalar(like: Tensor, value: float) -> Tensor:
    return torch.full((), value, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def _lasso(cost: Tensor) -> Tensor:
    half = _ramp(cost, len(cost))
    groups = _labels(cost, *cost.shape[:2])
    return group_lasso_plan(cost.abs(), groups, epsilon=half, eta=0.2 * half, outer=3, iterations=10)


ANGLES = 0.16  # logits up to 5 of eight roundings of 2^-9 each; a cross-entropy errs by twice that of a logit
CALLS = [
    Call("mmd/weighted", lambda z: mmd(z, _ramp(z, 2), _ramp(z, 3, 6)), ((3, 6, 5),)),
    Call("mmd/even", lambda z: mmd(z, _ramp(z, 2)), ((3, 6, 5),)),
    Call("coral/wide", lambda z: coral_penalty(z, _ramp(z, 3, 6)), ((3, 6, 15),)),
    Call("coral/tall", coral_penalty, ((3, 6, 5),)),
    Call(
        "margin/large",
        lambda x: large_margin(x, torch.eye(5, device=x.device).to(x), _labels(x, 7, 2), gamma=1.0, top_k=2),
        ((7, 5),),
    ),
    Call(
        "margin/angular",
        lambda z, w: additive_angular(z, w, _labels(z, 7), scale=4.0),
        ((7, 4), (5, 4)),
        rounding=ANGLES,
    ),
    Call(
        "margin/softmax",
        lambda z, w: large_margin_softmax(z, w, _labels(z, 7)),
        ((7, 4), (5, 4)),
        rounding=ANGLES,
    ),
    Call(
        "gradient_variance",
        lambda z, x: gradient_variance(z, x, _labels(z, 2, 6), _ramp(z, 2, 6)),
        ((2, 6, 5), (2, 6, 4)),
    ),
    Call("contrastive/supervised", lambda z: supervised_contrastive(z, _labels(z, 9)), ((9, 5),)),
    Call(
        "contrastive/strict",
        lambda z: supervised_contrastive(z / 8, _labels(z, 9), mode="strict", temperature=0.5),
        ((9, 5),),
    ),
    Call(
        "contrastive/two_towers",
        lambda x, y: multi_positive(x, y, _labels(x, 9), _labels(x, 7), temperature=_scalar(x, 0.2)),
        ((9, 5), (7, 5)),
    ),
    Call(
        "contrastive/sigmoid",
        lambda x, y: pairwise_sigmoid(
            x, y, _labels(x, 9), _labels(x, 7), scale=_scalar(x, 5.0), bias=_scalar(x, -2.0)
        ),
        ((9, 5), (7, 5)),
    ),
    Call(
        "soft_cross_entropy/mixed",
        lambda x: soft_cross_entropy(
            x, _labels(x, 2, 7), other=_labels(x, 2, 7).flip(1), share=_ramp(x, 2) / 2, weight=_ramp(x, 2, 7)
        ),
        ((2, 7, 4),),
    ),
    Call(
        "soft_cross_entropy/dense",
        lambda x, t: soft_cross_entropy(x, t, smoothing=0.1),
        ((2, 7, 4), (2, 7, 4)),
    ),
    *(
        Call(
            f"distillation/{kind}",
            lambda s, t, kind=kind: distillation(
                s, t, _labels(s, 7), weight=_ramp(s, 7), divergence=kind, alpha=0.7, beta=0.3
            ),
            ((7, 5), (7, 5)),
        )
        for kind in ("forward", "reverse", "jensen-shannon")
    ),
    Call("sinkhorn/full", lambda x, y: transport_loss(x, y, iterations=10), ((2, 7, 4), (2, 6, 4))),
    Call(
        "sinkhorn/partial",
        lambda x, y: transport_loss(
            x, y, mass=0.6, metric="euclidean", iterations=10, prior=_ramp(x, 2, 7, 6), epsilon=0.2
        ),
        ((2, 7, 4), (2, 6, 4)),
    ),
    Call(
        "sinkhorn/plan",
        lambda x, y: transport_plan(x, y, iterations=10, epsilon=0.2),
        ((2, 7, 4), (2, 6, 4)),
        differentiable=False,
    ),
    Call("sinkhorn/group_lasso", _lasso, ((2, 7, 6),), differentiable=False),
    *(
        Call(f"robust/{name}", function, ((5, 9),), differentiable=False)
        for name, function in (
            ("weighted_mean", lambda u: weighted_mean(u, _ramp(u, 5))),
            ("clipped_mean", lambda u: weighted_mean(u, _ramp(u, 5), factors=clip_factors(u, 2.0))),
            ("median", coordinate_median),
            ("trimmed_mean", lambda u: trimmed_mean(u, 1)),
            ("distances", squared_distances),
            ("norms", squared_norms),
        )
    ),
]
