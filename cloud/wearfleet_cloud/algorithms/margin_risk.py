"""The risk of windows mixed of two labels when every label asks for a large margin."""

import math
from typing import Final

from torch import Tensor

from wearfleet_cloud.algorithms.base import CORRECTED
from wearfleet_cloud.kernels.margin import large_margin

__all__ = ["mixed_margin_risks"]

_FLOOR: Final = 1e-3
"""Smallest norm of a slope in corrected mode (specs/ood.md P31)."""


def mixed_margin_risks(
    logits: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    shares: Tensor,
    gamma: Tensor,
    *,
    top_k: int,
    mode: str,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean over the windows of every domain of ``sum_j share_ij LM(z_i, y_ij)``.

    LM = -clip(distance to the label's border, -3 gamma, gamma).

    Args:
        logits: (D, B, K) of the linear head.
        head_weight: (K, F) of that head.
        labels: (D, B, J) int64.
        shares: (D, B, J), of every label.
        gamma: () largest distance that is still rewarded, above 0.
        top_k: competing classes whose mean distance counts.
        mode: "strict" divides by the slope of the published code, at least 1e-8; "corrected" by at least 1e-3, so that
            a sure softmax does not make losses of 1e4 that drown all others.
        weight: (D, B) of each window, None for ones; the mean divides by their sum.

    Returns:
        (D,), may be negative.

    Source: Lu et al. 2024, arXiv:2211.05228, equation 7; specs/ood.md 3.2, ``kernels/margin`` for the distance.
    """
    floor = _FLOOR if mode == CORRECTED else 0.0
    # gamma may differ between stacked runs, so the clip is here and not in the kernel
    losses = large_margin(
        logits.flatten(0, 1), head_weight, labels.flatten(0, 1), gamma=math.inf, top_k=top_k, floor=floor
    )
    clipped = losses.clamp(min=-gamma, max=3.0 * gamma).reshape(labels.shape)
    terms = (clipped * shares).sum(dim=2)
    if weight is None:
        return terms.mean(dim=1)
    return (terms * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-12)
