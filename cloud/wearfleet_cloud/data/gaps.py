"""Samples that were lost: bridge short gaps by interpolation, and find the stretches without long ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["bridge", "stretches"]


def bridge(samples: NDArray[np.float64], longest: int | None) -> NDArray[np.float64]:
    """Interpolate linearly, channel by channel, where a value is NaN and values before and after it are known.

    Args:
        samples: (T, C), NaN where a value was lost.
        longest: gaps of more samples stay NaN; None bridges every gap.

    Returns:
        (T, C), a new array. What was lost at an end, or in a channel without any value, stays NaN.
    """
    filled = samples.copy()
    place = np.arange(len(samples))
    for channel in range(samples.shape[1]):
        lost = np.isnan(samples[:, channel])
        known = np.flatnonzero(~lost)
        if not lost.any() or len(known) == 0:
            continue
        right = np.searchsorted(known, place[lost])
        inside = (right > 0) & (right < len(known))
        width = known[np.minimum(right, len(known) - 1)] - known[np.maximum(right - 1, 0)] - 1
        bridged = place[lost][inside if longest is None else inside & (width <= longest)]
        filled[bridged, channel] = np.interp(bridged, known, samples[known, channel])
    return filled


def stretches(usable: NDArray[np.bool_]) -> list[slice]:
    """The longest runs of True.

    Args:
        usable: (T,) bool.

    Returns:
        Slices in order, none empty.
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([False], usable, [False]))))
    return [slice(a, b) for a, b in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)]
