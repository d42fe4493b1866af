"""Per-channel standardisation, fitted on source training windows only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from wearfleet_protos.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["standardisation_of"]


def standardisation_of(
    x: NDArray[np.float32] | Sequence[NDArray[np.float32]],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of each channel over all windows and samples, computed in float64.

    Args:
        x: (N, C, T) training windows, or several such arrays (one a domain) taken together.

    Returns:
        mean (C,) and std (C,) float32 in the channel's unit; a constant channel has std 1, so it becomes 0.

    Raises:
        ShapeError: no window, arrays that differ in channels, or values that are not finite.
    """
    parts = [x] if isinstance(x, np.ndarray) else list(x)
    if not parts or any(p.ndim != 3 for p in parts) or len({p.shape[1] for p in parts}) != 1:
        raise ShapeError(f"expected arrays (N, C, T) with the same C, got {[p.shape for p in parts]}")
    count = sum(p.shape[0] * p.shape[2] for p in parts)
    if count == 0:
        raise ShapeError("expected at least one window to fit the standardisation on, got none")
    mean = np.sum([p.sum(axis=(0, 2), dtype=np.float64) for p in parts], axis=0) / count
    squares = [np.einsum("nct,nct->c", d, d) for d in (p - mean[:, None] for p in parts)]
    std = np.sqrt(np.sum(squares, axis=0) / count)
    if not bool(np.isfinite(std).all()):
        raise ShapeError("windows hold NaN or infinity; clean them before fitting the standardisation")
    constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
    return mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32)
