"""The risk of windows mixed of two labels when every label asks for a large margin."""

import math
from typing import Final

from torch import Tensor

from wearfleet_cloud.algorithms.base import CORRECTED
from wearfleet_cloud.kernels.margin import large_margin

__all__ = ["mixed_margin_risk"]

_FLOOR: Final = 1e-3
"""Smallest norm of a slope in corrected mode (specs/ood.md P31)."""


def mixed_margin_risk(
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
    """Mean over windows of ``sum_j share_ij LM(z_i, y_ij)``, LM = -clip(distance to the border, -3 gamma, gamma).

    Args:
        logits: (B, K) of the linear head.
        head_weight: (K, F) of that head.
        labels: (B, J) int64.
        shares: (B, J), of every label.
        gamma: () largest distance that is still rewarded, above 0.
        top_k: competing classes whose mean distance counts.
        mode: "strict" divides by the slope of the published code, at least 1e-8; "corrected" by at least 1e-3, so that
            a sure softmax does not make losses of 1e4 that drown all others.
        weight: (B,) of each window, None for ones; the mean divides by their sum.

    Returns:
        (), may be negative.

    Source: Lu et al. 2024, arXiv:2211.05228, equation 7; specs/ood.md 3.2, ``kernels/margin`` for the distance.
    """
    floor = _FLOOR if mode == CORRECTED else 0.0
    # gamma may differ between stacked runs, so the clip is here and not in the kernel
    losses = large_margin(logits, head_weight, labels, gamma=math.inf, top_k=top_k, floor=floor)
    terms = (losses.clamp(min=-gamma, max=3.0 * gamma) * shares).sum(dim=1)
    if weight is None:
        return terms.mean()
    return (terms * weight).sum() / weight.sum().clamp(min=1e-12)
