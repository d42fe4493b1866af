"""Aggregates of many updates by their definitions, in the arithmetic of their input."""

import torch
from torch import Tensor

__all__ = [
    "median_reference",
    "squared_distances_reference",
    "squared_norms_reference",
    "trimmed_mean_reference",
    "weighted_sum_reference",
]


def weighted_sum_reference(updates: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights_k updates_k: (K, P), (K,) -> (P,)."""
    return (weights[:, None] * updates).sum(dim=0)


def median_reference(updates: Tensor) -> Tensor:
    """Median of every coordinate; of an even number the mean of the middle two: (K, P) -> (P,)."""
    ordered = updates.sort(dim=0).values
    first, second = ordered[(len(updates) - 1) // 2], ordered[len(updates) // 2]
    middle = torch.where(first == second, first, 0.5 * first + 0.5 * second)
    return torch.where(updates.isnan().any(dim=0), torch.nan, middle)


def trimmed_mean_reference(updates: Tensor, trim: int) -> Tensor:
    """Mean of every coordinate without its ``trim`` smallest and largest values: (K, P) -> (P,)."""
    kept = updates.sort(dim=0).values[trim : len(updates) - trim]
    return torch.where(updates.isnan().any(dim=0), torch.nan, kept.mean(dim=0))


def squared_distances_reference(updates: Tensor) -> Tensor:
    """sum_p (updates_ip - updates_jp)^2: (K, P) -> (K, K)."""
    return (updates[:, None] - updates[None]).square().sum(dim=-1)


def squared_norms_reference(updates: Tensor) -> Tensor:
    """sum_p updates_kp^2: (K, P) -> (K,)."""
    return updates.square().sum(dim=1)
