"""The same aggregates where Triton does not compute: exact order, sums in float64, made for a slice of the updates."""

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "median_direct",
    "paired",
    "squared_distances_direct",
    "squared_norms_direct",
    "trimmed_mean_direct",
    "weighted_sum_direct",
]


def weighted_sum_direct(updates: Tensor, weights: Tensor) -> Tensor:
    """(K, P), (K,) float64 -> (P,) float64."""
    return weights @ updates.double()


def median_direct(updates: Tensor) -> Tensor:
    """(K, P) -> (P,) float32, of float64 updates float64."""
    ordered = _ordered(updates)
    first, second = ordered[:, (len(updates) - 1) // 2], ordered[:, len(updates) // 2]
    middle = torch.where(first == second, first, 0.5 * first + 0.5 * second)
    return torch.where(ordered[:, -1].isnan(), torch.nan, middle)


def trimmed_mean_direct(updates: Tensor, trim: int) -> Tensor:
    """(K, P) -> (P,) float64."""
    ordered = _ordered(updates)
    mean = ordered[:, trim : len(updates) - trim].mean(dim=1, dtype=torch.float64)
    return torch.where(ordered[:, -1].isnan(), torch.nan, mean)


def squared_distances_direct(updates: Tensor) -> Tensor:
    """(K, P) -> (K (K - 1) / 2,) float64: of the pairs above the diagonal, row by row."""
    return torch.pdist(updates.double()).square()


def paired(distances: Tensor, count: int) -> Tensor:
    """The symmetric matrix of what ``squared_distances_direct`` lists: (count, count)."""
    matrix = distances.new_zeros((count, count))
    row, column = torch.triu_indices(count, count, 1, device=distances.device)
    matrix[row, column] = matrix[column, row] = distances
    return matrix


def squared_norms_direct(updates: Tensor) -> Tensor:
    """(K, P) -> (K,) float64."""
    norms: Tensor = torch.linalg.vector_norm(updates, dim=1, dtype=torch.float64)
    return norms.square()


def _ordered(updates: Tensor) -> Tensor:
    """(K, P) -> (P, K), ascending, NaN last. NumPy sorts in vector registers, about ten times as fast as torch."""
    exact = updates.to(torch.promote_types(updates.dtype, torch.float32)).T.contiguous()
    if exact.device.type == "cpu":
        return torch.from_numpy(np.sort(exact.numpy(), axis=1))
    return exact.sort(dim=1).values
