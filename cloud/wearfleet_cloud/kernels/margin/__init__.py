"""Losses that ask for a margin: in probability space, in angle, and by multiplied angle; the maths is in README.md."""

import math

import torch
from torch import Tensor
from wearfleet_protos.errors import ConfigError, ShapeError

from wearfleet_cloud.kernels.dispatch import takes_triton
from wearfleet_cloud.kernels.margin.closed_form import large_margin_closed
from wearfleet_cloud.kernels.margin.reference import (
    AGGREGATIONS,
    Aggregation,
    large_margin_reference,
    replaced_cross_entropy_reference,
)

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "additive_angular",
    "large_margin",
    "large_margin_closed",
    "large_margin_reference",
    "large_margin_softmax",
    "replaced_cross_entropy_reference",
]


def large_margin(
    logits: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    gamma: float,
    top_k: int = 1,
    aggregation: Aggregation = "mean",
    floor: float = 0.0,
) -> Tensor:
    """Minus the distance of every window to the border of its label, clipped to -3 gamma and gamma.

    The gradient goes through ``logits`` alone: the norms are constants. Works under ``torch.func.grad`` and ``vmap``.

    Args:
        logits: (N, K) = features @ weight.T + bias, K at least 2.
        weight: (K, F) of the linear classifier, the effective one where it is normalised.
        labels: (N, J) int64: a mixed window has two labels, which share softmax and norms.
        gamma: above 0.
        top_k: competing classes, the most probable ones; more than K - 1 means K - 1.
        aggregation: "mean" or "smallest" distance before the clip, or "each" clipped, then the mean.
        floor: smallest norm; 0 is the published form, whose values explode where the softmax is sure of itself.

    Returns:
        (N, J), float32 or wider; negative where the label wins.

    Raises:
        ShapeError: shapes that do not fit each other, or fewer than two classes.
        ConfigError: a number out of its range or an unknown aggregation.
    """
    if logits.dim() != 2 or logits.shape[1] < 2 or weight.shape[:1] != logits.shape[1:]:
        raise ShapeError(
            "logits must be (windows, classes), at least 2 classes, and weight (classes, features), got "
            f"{tuple(logits.shape)} and {tuple(weight.shape)}"
        )
    if labels.dim() != 2 or labels.shape[0] != logits.shape[0] or labels.shape[1] < 1:
        raise ShapeError(f"labels must be ({logits.shape[0]}, labels of a window), got {tuple(labels.shape)}")
    if not gamma > 0.0 or top_k < 1 or floor < 0.0 or aggregation not in AGGREGATIONS:
        raise ConfigError(
            "the large margin needs gamma > 0, top_k >= 1, floor >= 0 and an aggregation of "
            f"{', '.join(AGGREGATIONS)}, got {gamma}, {top_k}, {floor}, {aggregation!r}"
        )
    rows = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    rows = rows - rows.mean(
        dim=0
    )  # what all rows share cancels in every norm: better before than after rounding
    gram = rows @ rows.T
    rivals = min(top_k, logits.shape[1] - 1)
    if takes_triton(logits, gram, labels):
        from wearfleet_cloud.kernels.margin import kernel  # noqa: PLC0415  only where Triton is

        if logits.shape[1] <= kernel.MOST_CLASSES:
            return kernel.large_margin_triton(logits, gram, labels, gamma, rivals, aggregation, floor)
    return large_margin_closed(logits, gram, labels, gamma, rivals, aggregation, floor)


def additive_angular(
    features: Tensor, weight: Tensor, labels: Tensor, *, scale: float = 30.0, margin: float = 0.5
) -> Tensor:
    """Cross-entropy of scaled cosines after ``margin`` was added to the angle to the label's weight.

    Past pi - margin, where cos(theta + margin) would rise again, it goes on as cos(theta) - margin sin(margin).
    Works under ``torch.func.grad`` and ``vmap``.

    Args:
        features: (N, F).
        weight: (K, F).
        labels: (N,) int64.
        scale: above 0.
        margin: radians, 0 to below pi.

    Returns:
        (N,) nats, float32 or wider.

    Raises:
        ShapeError: shapes that do not fit each other.
        ConfigError: a number out of its range.

    Source: Deng et al. 2019, arXiv:1801.07698, equation 3.
    """
    _check_angles(features, weight, labels)
    if not (scale > 0.0 and 0.0 <= margin < math.pi):
        raise ConfigError(
            f"additive angular margin needs scale > 0 and margin in 0 to pi, got {scale}, {margin}"
        )
    normalize = torch.nn.functional.normalize
    logits = normalize(features, dim=1) @ (scale * normalize(weight, dim=1)).T
    own = _own(logits, labels) / scale
    turned = own * math.cos(margin) - _sine(own) * math.sin(margin)
    target = torch.where(own > -math.cos(margin), turned, own - margin * math.sin(margin))
    return _replaced_cross_entropy(logits, scale * target, labels)


def large_margin_softmax(features: Tensor, weight: Tensor, labels: Tensor, *, margin: int = 2) -> Tensor:
    """Cross-entropy after the angle to the label's weight was multiplied by ``margin``.

    The label's logit |w| |z| cos(theta) becomes |w| |z| psi(theta), psi = (-1)^k cos(m theta) - 2 k for theta from
    k pi / m to (k + 1) pi / m, which falls all the way. Works under ``torch.func.grad`` and ``vmap``.

    Args:
        features: (N, F).
        weight: (K, F).
        labels: (N,) int64.
        margin: m, whole, at least 1.

    Returns:
        (N,) nats, float32 or wider.

    Raises:
        ShapeError: shapes that do not fit each other.
        ConfigError: margin below 1.

    Source: Liu et al. 2016, arXiv:1612.02295, equations 4 to 6.
    """
    _check_angles(features, weight, labels)
    if margin < 1:
        raise ConfigError(f"the margin of large-margin softmax must be at least 1, got {margin}")
    logits = features @ weight.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    size = features.norm(dim=1, dtype=wide) * weight.norm(dim=1, dtype=wide)[labels]
    own = _own(logits, labels) / size.clamp(min=1e-12)
    angle = torch.arccos(own.clamp(-1.0 + 1e-6, 1.0 - 1e-6))
    k = (angle.detach() * margin / math.pi).floor().clamp(max=margin - 1)
    psi = torch.where(k % 2 == 0, 1.0, -1.0) * torch.cos(margin * angle) - 2.0 * k
    return _replaced_cross_entropy(logits, size * psi, labels)


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of the label (N,), in float32 or wider for the trigonometry that follows."""
    return logits.gather(1, labels[:, None])[:, 0].to(torch.promote_types(logits.dtype, torch.float32))


def _sine(cosine: Tensor) -> Tensor:
    """Of an angle in 0 to pi; its slope stays finite at both ends."""
    return (1.0 - cosine.square()).clamp(min=1e-12).sqrt()


def _check_angles(features: Tensor, weight: Tensor, labels: Tensor) -> None:
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1]:
        raise ShapeError(
            "features must be (windows, F) and weight (classes, F), got "
            f"{tuple(features.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != features.shape[:1]:
        raise ShapeError(f"labels must be ({features.shape[0]},), got {tuple(labels.shape)}")


def _replaced_cross_entropy(logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    if takes_triton(logits, target, labels):
        from wearfleet_cloud.kernels.margin import kernel  # noqa: PLC0415  only where Triton is

        if logits.shape[1] <= kernel.MOST_LOGITS:
            return kernel.replaced_cross_entropy_triton(logits, target, labels)
    return replaced_cross_entropy_reference(logits, target, labels)
