"""How much each client counts in the model of another: distances between clients, and weights from them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["mixture_weights", "wasserstein_distances"]

Array = NDArray[Any]

_NEAREST: Final = 1e-14
"""Smaller distances count as this one, so that clients with equal statistics share rather than divide by 0."""


def wasserstein_distances(means: Array, deviations: Array, sizes: Sequence[int], *, squared: bool) -> Array:
    """Distances between clients whose layers' inputs are taken for diagonal Gaussians.

    d_ij = sum_l sqrt(||mu_i^l - mu_j^l||^2 + ||sigma_i^l - sigma_j^l||^2), the 2-Wasserstein distance of each layer;
    squared, without the root.

    Args:
        means: (N, sum of sizes) float64, the layers side by side.
        deviations: the same of standard deviations.
        sizes: channels of each layer.
        squared: leave out the root.

    Returns:
        (N, N) float64, symmetric to the bit, 0 on the diagonal. Memory beside it is that of one client's row.

    Source: Lu et al. 2022, arXiv:2112.00734, the distance of AdaFed; specs/federated.md section 4, phase B.
    """
    bounds = np.cumsum([0, *sizes])
    distances = np.zeros((len(means), len(means)))
    for client in range(len(means)):
        apart = (means - means[client]) ** 2 + (deviations - deviations[client]) ** 2  # (N, channels)
        layers = [apart[:, a:b].sum(axis=1) for a, b in pairwise(bounds)]
        distances[client] = sum(layer if squared else np.sqrt(layer) for layer in layers)
    return distances


def mixture_weights(distances: Array, own: float, counts: Array, *, neighbours: int = 0) -> Array:
    """Weights W of the mixtures theta_i = sum_j w_ij theta_j.

    w_ii = own; w_ij = (1 - own) a_ij / sum_{k != i} a_ik, a_ij = c_j / d_ij.

    Args:
        distances: (N, N), at least 0.
        own: lambda, 0 to 1: what a client's own model counts.
        counts: (N,) c_j, at least 0: 1 for the paper's rule, windows to count by windows, 0 for who is left out.
        neighbours: only so many nearest ones of a client count; 0 for all. Equally near ones beyond count too.

    Returns:
        (N, N) float64 whose rows sum to 1. Who has no neighbour that counts has its own model alone.

    Source: as above; specs/federated.md section 4, phase B.
    """
    near = np.where(counts[None, :] > 0, distances, np.inf)
    np.fill_diagonal(near, np.inf)
    if 0 < neighbours < len(near) - 1:
        furthest = np.partition(near, neighbours - 1, axis=1)[:, neighbours - 1 : neighbours]
        near = np.where(near <= furthest, near, np.inf)
    closeness = counts[None, :] / np.maximum(near, _NEAREST)
    total = closeness.sum(axis=1, keepdims=True)
    alone = total == 0.0
    weights = (1.0 - own) * closeness / np.where(alone, 1.0, total)
    np.fill_diagonal(weights, np.where(alone[:, 0], 1.0, own))
    return weights
