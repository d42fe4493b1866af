"""Cross-entropy against soft targets, by its definition."""

import torch
from torch import Tensor

__all__ = ["soft_cross_entropy_reference", "targets_of"]


def targets_of(
    labels: Tensor,
    classes: int,
    other: Tensor | None,
    share: Tensor | None,
    smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """The distribution over classes that every window should get.

    Args:
        labels: (D, B) int64, or (D, B, K) probabilities, which are only smoothed.
        classes: K.
        other: (D, B) int64 second label of a mixed window, or None.
        share: (D,) of the first label, with ``other``.
        smoothing: moved from the labels to all classes evenly.
        dtype: of the result.

    Returns:
        (D, B, K) = (1 - smoothing) (share e_labels + (1 - share) e_other) + smoothing / K.
    """
    if labels.is_floating_point():
        hard = labels.to(dtype)
    else:
        ids = torch.arange(classes, device=labels.device)
        hard = (labels[..., None] == ids).to(dtype)
        if other is not None and share is not None:
            part = share.to(dtype)[:, None, None]
            hard = part * hard + (1.0 - part) * (other[..., None] == ids).to(dtype)
    return (1.0 - smoothing) * hard + smoothing / classes


def soft_cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    other: Tensor | None = None,
    share: Tensor | None = None,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """risk_d = sum_b w_db sum_k t_dbk (lse(l_db) - l_dbk) / sum_b w_db, t of ``targets_of``.

    Args:
        logits: (D, B, K).
        labels: (D, B) int64 or (D, B, K) probabilities.
        other: (D, B) int64 or None.
        share: (D,) or None.
        weight: (D, B) or None for ones.
        smoothing: 0 to below 1.

    Returns:
        (D,) nats; 0 for a domain without weight.

    Source: Zhang et al. 2018, arXiv:1710.09412, equation 1 (mixed labels); Szegedy et al. 2016,
    arXiv:1512.00567, section 7 (smoothing); specs/ood.md 2.2.
    """
    targets = targets_of(labels, logits.shape[-1], other, share, smoothing, logits.dtype)
    losses = -(targets * torch.log_softmax(logits, dim=-1)).sum(dim=-1)
    if weight is None:
        return losses.mean(dim=-1)
    return (losses * weight).sum(dim=-1) / weight.sum(dim=-1).clamp(min=1e-12)
