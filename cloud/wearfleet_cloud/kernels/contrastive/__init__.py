"""Contrastive losses over all pairs of rows: supervised, of two towers, and pairwise; the maths is in README.md."""

from typing import Literal

import torch
from torch import Tensor
from wearfleet_protos.errors import ConfigError, ShapeError

from wearfleet_cloud.kernels.contrastive.reference import (
    sigmoid_losses_reference,
    softmax_statistics_reference,
)
from wearfleet_cloud.kernels.dispatch import takes_triton

__all__ = [
    "multi_positive",
    "pairwise_sigmoid",
    "sigmoid_losses_reference",
    "softmax_statistics_reference",
    "supervised_contrastive",
]

_EPS = 1e-6  # of the published code, inside its logarithm and beside its counts


def supervised_contrastive(
    features: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: float = 0.07,
    mode: Literal["corrected", "strict"] = "corrected",
) -> Tensor:
    """Pull windows of one class together: minus the mean log-probability of a window's positives among all others.

    "corrected" compares features of unit length and averages over the windows that have a positive. "strict" is the
    published code: features as they are, the largest similarity of a row taken with the row itself, 1e-6 inside the
    logarithm and beside the counts, and the mean over all windows (specs/ood.md P7).

    Works under ``torch.func.grad`` and ``vmap``.

    Args:
        features: (M, F); memory grows with M F, not M^2, on a GPU, and with M^2 on a processor.
        labels: (M,) int64, not negative.
        weight: (M,) 0 for padding, which takes no part; None for none. Other values count as 1.
        temperature: above 0.
        mode: "corrected" or "strict".

    Returns:
        (); 0 when no window has a positive.

    Raises:
        ShapeError: shapes that do not fit each other.
        ConfigError: temperature not above 0, or an unknown mode.

    Source: Khosla et al. 2020, arXiv:2004.11362, equation 2; specs/ood.md 4.5.
    """
    _check(features, features, labels, labels)
    if not temperature > 0.0 or mode not in ("corrected", "strict"):
        raise ConfigError(
            f"contrastive needs temperature > 0 and mode corrected or strict, got {temperature}, {mode!r}"
        )
    labels, features = _present(labels, weight, features)
    ones = torch.ones_like(features[:, 0], dtype=_wide(features))
    scale = _inverse_norms(features) if mode == "corrected" else ones
    lse, positives, counts, largest = _statistics(
        features, features, scale / temperature, scale, labels, labels, without_self=True
    )
    rows = labels >= 0
    if mode == "strict":
        shifted = torch.where(rows, (lse - largest).exp() + _EPS, 1.0).log() + largest
        terms = (positives - counts * shifted) / (counts + _EPS)
        return -torch.where(rows, terms, 0.0).sum() / rows.sum().clamp(min=1)
    judged = rows & (counts > 0)
    terms = torch.where(judged, lse - positives / counts.clamp(min=1.0), 0.0)
    return terms.sum() / judged.sum().clamp(min=1)


def multi_positive(
    first: Tensor,
    second: Tensor,
    first_labels: Tensor,
    second_labels: Tensor,
    *,
    temperature: Tensor,
) -> Tensor:
    """Softmax contrast of two towers in both directions; every pair of equal labels is a positive.

    Works under ``torch.func.grad`` and ``vmap``.

    Args:
        first: (M, F), brought to unit length here.
        second: (N, F), likewise.
        first_labels: (M,) int64; negative ones are absent.
        second_labels: (N,) int64; negative ones are absent.
        temperature: () above 0, may be learnt.

    Returns:
        () mean of both directions over rows that have a positive.

    Raises:
        ShapeError: shapes that do not fit each other.

    Source: Khosla et al. 2020, arXiv:2004.11362, across two towers; specs/extended.md 1.4.
    """
    _check(first, second, first_labels, second_labels)
    one, two = _inverse_norms(first), _inverse_norms(second)
    cold = 1.0 / temperature.to(one.dtype)
    forth = _direction(first, second, one * cold, two, first_labels, second_labels)
    back = _direction(second, first, two * cold, one, second_labels, first_labels)
    return 0.5 * (forth + back)


def pairwise_sigmoid(
    first: Tensor,
    second: Tensor,
    first_labels: Tensor,
    second_labels: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
) -> Tensor:
    """Every pair is a decision of its own: minus the sum of log sigmoid(z (scale cos + bias)), a row's mean.

    Works under ``torch.func.grad`` and ``vmap``.

    Args:
        first: (M, F), brought to unit length here.
        second: (N, F), likewise.
        first_labels: (M,) int64; negative ones are absent.
        second_labels: (N,) int64; negative ones are absent.
        scale: () above 0, may be learnt; 10 to begin with.
        bias: () may be learnt; -10 to begin with.

    Returns:
        () sum over present pairs over the number of present rows.

    Raises:
        ShapeError: shapes that do not fit each other.

    Source: Zhai et al. 2023, arXiv:2303.15343, equation 3, with every pair of equal labels
    positive; specs/extended.md 1.4.
    """
    _check(first, second, first_labels, second_labels)
    one, two = _inverse_norms(first), _inverse_norms(second)
    arguments = (
        first, second, one * scale.to(one.dtype), two, bias.to(one.dtype), first_labels, second_labels
    )  # fmt: skip
    if takes_triton(*arguments):
        from wearfleet_cloud.kernels.contrastive import kernel  # noqa: PLC0415  only where Triton is

        losses = kernel.sigmoid_losses_triton(*arguments)
    else:
        losses = sigmoid_losses_reference(first.to(one.dtype), second.to(one.dtype), *arguments[2:])
    return losses.sum() / (first_labels >= 0).sum().clamp(min=1)


def _direction(
    x: Tensor, y: Tensor, scale_x: Tensor, scale_y: Tensor, labels_x: Tensor, labels_y: Tensor
) -> Tensor:
    lse, positives, counts, _ = _statistics(x, y, scale_x, scale_y, labels_x, labels_y, without_self=False)
    judged = (labels_x >= 0) & (counts > 0)
    terms = torch.where(judged, lse - positives / counts.clamp(min=1.0), 0.0)
    return terms.sum() / judged.sum().clamp(min=1)


def _statistics(
    x: Tensor,
    y: Tensor,
    scale_x: Tensor,
    scale_y: Tensor,
    labels_x: Tensor,
    labels_y: Tensor,
    *,
    without_self: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if takes_triton(x, y, scale_x, scale_y, labels_x, labels_y):
        from wearfleet_cloud.kernels.contrastive import kernel  # noqa: PLC0415  only where Triton is

        return kernel.softmax_statistics_triton(x, y, scale_x, scale_y, labels_x, labels_y, without_self)
    wide = scale_x.dtype
    return softmax_statistics_reference(
        x.to(wide), y.to(wide), scale_x, scale_y, labels_x, labels_y, without_self
    )


def _inverse_norms(features: Tensor) -> Tensor:
    """(M,) float32 or wider, 1 / max(|row|, 1e-12)."""
    norms: Tensor = torch.linalg.vector_norm(features.to(_wide(features)), dim=1)
    return norms.clamp(min=1e-12).reciprocal()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _present(labels: Tensor, weight: Tensor | None, features: Tensor) -> tuple[Tensor, Tensor]:
    """Labels with -1 for padding, and features with 0 there, which may have held anything."""
    if weight is None:
        return labels, features
    if weight.shape != labels.shape:
        raise ShapeError(f"weight must be {tuple(labels.shape)}, got {tuple(weight.shape)}")
    here = weight > 0
    return torch.where(here, labels, -1), torch.where(here[:, None], features, 0.0)


def _check(first: Tensor, second: Tensor, first_labels: Tensor, second_labels: Tensor) -> None:
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1] or 0 in first.shape:
        raise ShapeError(
            f"features must be (rows, F), at least one each, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    for features, labels in ((first, first_labels), (second, second_labels)):
        if labels.shape != features.shape[:1]:
            raise ShapeError(f"labels must be ({features.shape[0]},), got {tuple(labels.shape)}")
