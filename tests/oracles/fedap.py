"""FedAP as its paper writes it: distances, weights and mixtures in loops over clients and numbers."""

import math

import numpy as np

Moments = list[tuple[np.ndarray, np.ndarray]]
"""Mean and variance of each layer's input."""


def distance(one: Moments, other: Moments, *, squared: bool = False) -> float:
    total = 0.0
    for (mean, variance), (mean2, variance2) in zip(one, other, strict=True):
        layer = 0.0
        for c in range(len(mean)):
            layer += (float(mean[c]) - float(mean2[c])) ** 2
            layer += (math.sqrt(variance[c]) - math.sqrt(variance2[c])) ** 2
        total += layer if squared else math.sqrt(layer)
    return total


def weights_of(name: str, moments: dict[str, Moments], own: float) -> dict[str, float]:
    """The row of W of one client."""
    closeness = {
        other: 1.0 / max(distance(moments[name], moments[other]), 1e-14) for other in moments if other != name
    }
    if not closeness:
        return {name: 1.0}
    total = sum(closeness.values())
    return {name: own, **{other: (1.0 - own) * a / total for other, a in closeness.items()}}


def mixture(row: dict[str, float], models: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """sum_j w_j theta_j."""
    first = models[next(iter(row))]
    return {
        tensor: sum(weight * models[name][tensor].astype(float) for name, weight in row.items()).astype(
            array.dtype
        )
        for tensor, array in first.items()
    }


def moments_of(windows_entering: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In one shot: (N, C, T) to mean and biased variance of each channel."""
    return windows_entering.mean(axis=(0, 2)), windows_entering.var(axis=(0, 2))
