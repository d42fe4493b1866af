"""The same from two products of matrices a domain, without a gradient of any single window."""

from torch import Tensor

from wearfleet_cloud.kernels.gradient_variance.reference import residuals, weights_of, with_bias

__all__ = ["gradient_variance_closed"]


def gradient_variance_closed(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Equal to ``gradient_variance_reference``: (r^2)^T z^2 - (r^T z)^2, because a gradient is an outer product.

    Source: specs/ood.md 4.4.
    """
    residual, inputs = residuals(logits, labels), with_bias(features)
    share = weights_of(labels, weight, features.dtype)[..., None]
    squares = (share * residual.square()).transpose(1, 2) @ inputs.square()
    return squares - ((share * residual).transpose(1, 2) @ inputs).square()
