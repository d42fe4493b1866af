"""The same without targets of K numbers a window, for the processor."""

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

__all__ = ["soft_cross_entropy_direct"]


def soft_cross_entropy_direct(
    logits: Tensor,
    labels: Tensor,
    other: Tensor | None = None,
    share: Tensor | None = None,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Equal to ``soft_cross_entropy_reference``; mixed labels cost two look-ups, not K products a window."""
    losses = _losses(logits, labels, smoothing)
    if other is not None and share is not None:
        part = share[:, None]
        losses = part * losses + (1.0 - part) * _losses(logits, other, smoothing)
    if weight is None:
        return losses.mean(dim=1)
    return (losses * weight).sum(dim=1) / torch.clamp(weight.sum(dim=1), min=1e-12)


def _losses(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    domains, windows, classes = logits.shape
    if labels.is_floating_point():
        # the smoothed part is written out: probabilities need not sum to one, as torch's smoothing assumes
        scores = torch.log_softmax(logits, dim=-1)
        return -((1.0 - smoothing) * labels + smoothing / classes).mul(scores).sum(dim=-1)
    flat = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=smoothing
    )
    return flat.reshape(domains, windows)
