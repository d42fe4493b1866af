"""Cross-entropy of every domain against hard, mixed, smoothed or dense targets; the maths is in README.md."""

import torch
from torch import Tensor
from wearfleet_protos.errors import ConfigError, ShapeError

from wearfleet_cloud.kernels.dispatch import takes_triton
from wearfleet_cloud.kernels.soft_cross_entropy.direct import soft_cross_entropy_direct
from wearfleet_cloud.kernels.soft_cross_entropy.reference import soft_cross_entropy_reference

__all__ = ["soft_cross_entropy", "soft_cross_entropy_direct", "soft_cross_entropy_reference"]


def soft_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    other: Tensor | None = None,
    share: Tensor | None = None,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy of every domain, nats: what ERM, Mixup, VREx and GroupDRO weigh and combine.

    Works under ``torch.func.grad`` and ``vmap``.

    Args:
        logits: (D, B, K), K >= 1.
        labels: (D, B) int64 class, or (D, B, K) probabilities (which have a gradient too).
        other: (D, B) int64 second class of windows that were mixed of two; needs ``share``.
        share: (D,) part of the first class, 0 to 1; has no gradient.
        weight: (D, B) of every window, 0 for padding, None for ones; has no gradient.
        smoothing: part of every target that goes to all classes evenly.

    Returns:
        (D,), float32 or wider; 0 for a domain whose windows all have weight 0.

    Raises:
        ShapeError: shapes that do not fit each other.
        ConfigError: smoothing outside 0 to below 1, or only one of ``other`` and ``share``.
    """
    _check(logits, labels, other, share, weight, smoothing)
    given = [tensor for tensor in (logits, labels, other, share, weight) if tensor is not None]
    if takes_triton(*given):
        from wearfleet_cloud.kernels.soft_cross_entropy import kernel  # noqa: PLC0415  only where Triton is

        if logits.shape[-1] <= kernel.MOST_CLASSES:
            return kernel.soft_cross_entropy_triton(logits, labels, other, share, weight, smoothing)
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits, labels = logits.to(wide), labels.to(wide) if labels.is_floating_point() else labels
    return soft_cross_entropy_direct(logits, labels, other, share, weight, smoothing)


def _check(
    logits: Tensor,
    labels: Tensor,
    other: Tensor | None,
    share: Tensor | None,
    weight: Tensor | None,
    smoothing: float,
) -> None:
    if logits.dim() != 3 or logits.shape[-1] < 1:
        raise ShapeError(f"logits must be (domains, windows, classes), got {tuple(logits.shape)}")
    wanted = logits.shape if labels.is_floating_point() else logits.shape[:2]
    if labels.shape != wanted:
        raise ShapeError(f"labels must be {tuple(wanted)} for these logits, got {tuple(labels.shape)}")
    for name, tensor, shape in (
        ("other", other, logits.shape[:2]), ("share", share, logits.shape[:1]), ("weight", weight, logits.shape[:2]),
    ):  # fmt: skip
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    if (other is None) != (share is None):
        raise ConfigError(
            "a second label needs the share of the first: give both other and share, or neither"
        )
    if other is not None and labels.is_floating_point():
        raise ConfigError(
            "probabilities hold all labels already: give other and share only with class numbers"
        )
    if not 0.0 <= smoothing < 1.0:
        raise ConfigError(f"smoothing must be at least 0 and below 1, got {smoothing}")
