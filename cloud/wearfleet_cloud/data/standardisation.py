"""What is taken off every channel and what it is divided by, fitted on source training windows only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Windows = NDArray[np.float32] | Sequence[NDArray[np.float32]]
    Standardisation = Callable[[Windows], tuple[NDArray[np.float32], NDArray[np.float32]]]

__all__ = ["STANDARDISATIONS", "ranges_of", "standardisation_of", "untouched"]


def standardisation_of(x: Windows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of each channel over all windows and samples, computed in float64.

    Args:
        x: (N, C, T) training windows, or several such arrays (one a domain) taken together.

    Returns:
        mean (C,) and std (C,) float32 in the channel's unit; a constant channel has std 1, so it becomes 0.

    Raises:
        ShapeError: no window, arrays that differ in channels, or values that are not finite.
    """
    parts = _parts(x)
    count = sum(p.shape[0] * p.shape[2] for p in parts)
    mean = np.sum([p.sum(axis=(0, 2), dtype=np.float64) for p in parts], axis=0) / count
    squares = [np.einsum("nct,nct->c", d, d) for d in (p - mean[:, None] for p in parts)]
    std = np.sqrt(np.sum(squares, axis=0) / count)
    if not bool(np.isfinite(std).all()):
        raise ShapeError("windows hold NaN or infinity; clean them before fitting the standardisation")
    constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
    return mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32)


def ranges_of(x: Windows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smallest value and range of each channel over all windows and samples: training windows fill 0 to 1.

    Args and Raises: as for :func:`standardisation_of`.

    Returns:
        minimum (C,) and range (C,) float32 in the channel's unit; a constant channel has range 1, so it becomes 0.

    Source: the scaling of DDLearn's published data, specs/ood.md 3.5.
    """
    parts = _parts(x)
    low = np.min([p.min(axis=(0, 2)) for p in parts if len(p)], axis=0)
    span = np.max([p.max(axis=(0, 2)) for p in parts if len(p)], axis=0) - low
    if not bool(np.isfinite(span).all()):
        raise ShapeError("windows hold NaN or infinity; clean them before fitting the standardisation")
    return low.astype(np.float32), np.where(span > 0, span, 1.0).astype(np.float32)


def untouched(x: Windows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Zeros (C,) and ones (C,) float32: windows enter the network in the units they are stored in.

    Args: as for :func:`standardisation_of`.

    Source: the loaders of the published benchmarks, specs/ood.md 1.1.
    """
    channels = _parts(x)[0].shape[1]
    return np.zeros(channels, np.float32), np.ones(channels, np.float32)


STANDARDISATIONS: Final[Mapping[str, Standardisation]] = {
    "zscore": standardisation_of,
    "none": untouched,
    "min-max": ranges_of,
}
"""Name -> what is taken off every channel (C,) and what it is then divided by (C,)."""


def _parts(x: Windows) -> list[NDArray[np.float32]]:
    parts = [x] if isinstance(x, np.ndarray) else list(x)
    if not parts or any(p.ndim != 3 for p in parts) or len({p.shape[1] for p in parts}) != 1:
        raise ShapeError(f"expected arrays (N, C, T) with the same C, got {[p.shape for p in parts]}")
    if not any(p.size for p in parts):
        raise ShapeError("expected at least one window to fit the standardisation on, got none")
    return parts
