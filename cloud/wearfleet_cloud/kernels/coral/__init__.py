"""Distance of means and covariances between all pairs of domains; the maths is in README.md."""

import torch
from torch import Tensor
from wearfleet_protos.errors import ShapeError

from wearfleet_cloud.kernels.coral.gram import coral_penalty_gram
from wearfleet_cloud.kernels.coral.reference import coral_penalty_reference
from wearfleet_cloud.kernels.coral.spread import coral_penalty_spread
from wearfleet_cloud.kernels.dispatch import takes_triton

__all__ = ["coral_penalty", "coral_penalty_gram", "coral_penalty_reference", "coral_penalty_spread"]


def coral_penalty(features: Tensor, weight: Tensor | None = None) -> Tensor:
    """CORAL penalty by the cheaper of two equal forms.

    Works under ``torch.func.grad`` and ``vmap``.

    Args:
        features: (D, B, F) features of every domain.
        weight: (D, B) weight of each window, 0 for padding; None for ones. At least 2 a domain in total.

    Returns:
        (), float32 or wider, not negative; 0 for one domain.

    Raises:
        ShapeError: not three axes, fewer than two windows a domain, or weights of another shape.
    """
    if features.dim() != 3 or features.shape[1] < 2:
        raise ShapeError(f"features must be (domains, at least 2 windows, F), got {tuple(features.shape)}")
    if weight is not None and weight.shape != features.shape[:2]:
        raise ShapeError(f"weight must be {tuple(features.shape[:2])}, got {tuple(weight.shape)}")
    if features.shape[0] == 1:
        return features.new_zeros((), dtype=torch.promote_types(features.dtype, torch.float32))
    wide = features.shape[1] * 2 < features.shape[2]
    if takes_triton(features, *([] if weight is None else [weight])):
        from wearfleet_cloud.kernels.coral import kernel  # noqa: PLC0415  only where Triton is

        return kernel.coral_penalty_triton(features, weight, gram=wide)
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return coral_penalty_gram(features, weight) if wide else coral_penalty_spread(features, weight)
