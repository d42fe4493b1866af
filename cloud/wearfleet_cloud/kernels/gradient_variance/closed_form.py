"""The same from two products of matrices a domain, without a gradient of any single window."""

import torch
from torch import Tensor

from wearfleet_cloud.kernels.gradient_variance.reference import residuals, weights_of, with_bias

__all__ = ["gradient_variance_closed"]


def gradient_variance_closed(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Equal to ``gradient_variance_reference``: (r^2)^T z^2 - (r^T z)^2, because a gradient is an outer product.

    Computes in float32 or wider, because a variance is a difference. Windows of weight 0 may hold anything.

    Source: specs/ood.md 4.4.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    features, logits = features.to(wide), logits.to(wide)
    if weight is not None:
        absent = (weight == 0.0)[..., None]
        features, logits = features.masked_fill(absent, 0.0), logits.masked_fill(absent, 0.0)
    residual, inputs = residuals(logits, labels), with_bias(features)
    share = weights_of(labels, weight, wide)[..., None]
    squares = (share * residual.square()).transpose(1, 2) @ inputs.square()
    return squares - ((share * residual).transpose(1, 2) @ inputs).square()
