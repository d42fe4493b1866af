"""The CORAL penalty without covariance matrices, from inner products of windows."""

import torch
from torch import Tensor

from wearfleet_cloud.kernels.coral.reference import centred
from wearfleet_cloud.kernels.inner_products import inner_products

__all__ = ["coral_penalty_gram"]


def coral_penalty_gram(features: Tensor, weight: Tensor | None = None) -> Tensor:
    """Equal to ``coral_penalty_reference``; cheaper when windows are fewer than half of the features.

    One product of all centred windows with each other, (D B, F) x (F, D B), replaces D matrices (F, F): for
    32 windows and 832 features a thirteenth of the multiplications and none of the large differences.
    Squares are summed in float64, since three numbers of similar size are subtracted.

    Args:
        features: (D, B, F), D >= 2, B >= 2.
        weight: (D, B) or None for ones.

    Returns:
        ().

    Source: specs/ood.md 4.2; README.md beside this file.
    """
    domains, windows, width = features.shape
    means, rows, degrees = centred(features, weight)
    flat = (rows / degrees.sqrt()[:, None, None]).reshape(domains * windows, width)
    products = inner_products(flat).double().square()
    blocks = products.reshape(domains, windows, domains, windows).sum(dim=(1, 3))  # <C_a, C_b>
    covariance = torch.clamp(domains * blocks.diagonal().sum() - blocks.sum(), min=0.0).to(features.dtype)
    mean = domains * (means - means.mean(dim=0)).square().sum()
    pairs = domains * (domains - 1) / 2
    return (mean / width + covariance / width**2) / pairs
