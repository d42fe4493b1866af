"""Risks and accuracies that algorithms share."""

from torch import Tensor

from wearfleet_cloud.kernels.soft_cross_entropy import soft_cross_entropy

__all__ = ["accuracy", "cross_entropy", "domain_risks", "mixed_accuracy", "mixed_risk"]


def cross_entropy(logits: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over windows, nats.

    Args:
        logits: (B, K).
        y: (B,) int64.
        weight: (B,) weights, None for ones; the mean divides by their sum.

    Returns:
        ().
    """
    return domain_risks(logits[None], y[None], None if weight is None else weight[None])[0]


def domain_risks(logits: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of every domain, nats.

    Args:
        logits: (D, B, K).
        y: (D, B) int64.
        weight: (D, B) weights, None for ones.

    Returns:
        (D,).
    """
    return soft_cross_entropy(logits, y, weight=weight)


def mixed_risk(logits: Tensor, y: Tensor, other: Tensor, share: Tensor, weight: Tensor | None) -> Tensor:
    """Share CE(logits, y) + (1 - share) CE(logits, other), the mean over windows (B,): ()."""
    weights = None if weight is None else weight[None]
    return soft_cross_entropy(logits[None], y[None], other=other[None], share=share[None], weight=weights)[0]


def accuracy(logits: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Share of windows whose largest logit is the right one: (), for logits (..., K), y and weight (...)."""
    hits = (logits.detach().argmax(dim=-1) == y).to(logits.dtype)
    if weight is None:
        return hits.mean()
    return (hits * weight).sum() / weight.sum().clamp(min=1e-12)


def mixed_accuracy(logits: Tensor, y: Tensor, other: Tensor, share: Tensor, weight: Tensor | None) -> Tensor:
    """Accuracy on mixed windows, in which both labels count by their share: ()."""
    return share * accuracy(logits, y, weight) + (1.0 - share) * accuracy(logits, other, weight)
