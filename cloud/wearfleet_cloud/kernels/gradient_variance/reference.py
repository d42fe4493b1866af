"""Variance of the classifier's gradients over the windows of a domain, from the gradient of every window."""

import torch
from torch import Tensor

__all__ = ["gradient_variance_reference", "residuals", "weights_of", "with_bias"]


def gradient_variance_reference(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None
) -> Tensor:
    """v_d = mean_b G_db^2 - (mean_b G_db)^2 with the gradients G_db = (p_db - e_y) (x) (z_db, 1) written out.

    G_db is the gradient of the cross-entropy of one window by the weights and the bias of a linear classifier.

    Args:
        features: (D, B, F) input z of the classifier.
        logits: (D, B, K) its output, p = softmax(logits).
        labels: (D, B) int64.
        weight: (D, B) or None for ones.

    Returns:
        (D, K, F + 1) variances (biased); the last column belongs to the bias.

    Source: Rame et al. 2022, arXiv:2109.02934, equation 4, of the classifier alone (section 3.3);
    specs/ood.md 2.14.
    """
    gradients = residuals(logits, labels)[..., :, None] * with_bias(features)[..., None, :]
    share = weights_of(labels, weight, features.dtype)[..., None, None]
    mean = (share * gradients).sum(dim=1)
    return (share * (gradients - mean[:, None]).square()).sum(dim=1)


def residuals(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy by the logits: softmax minus one-hot label, (D, B, K)."""
    classes = torch.arange(logits.shape[-1], device=logits.device)
    return torch.softmax(logits, dim=-1) - (labels[..., None] == classes).to(logits.dtype)


def with_bias(features: Tensor) -> Tensor:
    """(D, B, F) -> (D, B, F + 1): a feature that is always 1, whose weight is the bias."""
    return torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)


def weights_of(labels: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weights (D, B) of a mean over each domain; all 0 for a domain without weight."""
    if weight is None:
        return torch.full(labels.shape, 1.0 / labels.shape[1], dtype=dtype, device=labels.device)
    return (weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-12)).to(dtype)
