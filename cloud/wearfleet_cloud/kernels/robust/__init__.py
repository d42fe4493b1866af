"""Aggregates of client updates that a few bad clients cannot move far; the maths is in README.md.

Updates may lie on another device than the one that computes, in a file mapped into memory for example: they are taken
slice by slice. Beside input and result lie one slice (64 MiB of a GPU, 1 MiB of a processor), its float64 copy where a
processor adds, and for distances two more matrices of all pairs. Nothing here runs under ``torch.func.vmap``: what is
computed depends on sizes and on whether numbers are in range.
"""

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor
from wearfleet_protos.errors import ConfigError, ShapeError

from wearfleet_cloud.kernels.dispatch import takes_triton
from wearfleet_cloud.kernels.robust.direct import (
    median_direct,
    paired,
    squared_distances_direct,
    squared_norms_direct,
    trimmed_mean_direct,
    weighted_sum_direct,
)
from wearfleet_cloud.kernels.robust.reference import (
    median_reference,
    squared_distances_reference,
    squared_norms_reference,
    trimmed_mean_reference,
    weighted_sum_reference,
)

__all__ = [
    "clip_factors",
    "coordinate_median",
    "finite_updates",
    "median_reference",
    "squared_distances",
    "squared_distances_reference",
    "squared_norms",
    "squared_norms_reference",
    "trimmed_mean",
    "trimmed_mean_reference",
    "weighted_mean",
    "weighted_sum_reference",
]

_SLICE_BYTES: Final = 64 << 20  # of a GPU
_CACHE_BYTES: Final = 1 << 20  # of a processor: what follows reads the slice from its cache
_MOST_ORDERED: Final = 4096  # updates whose coordinate fits into the registers of one Triton program


def weighted_mean(
    updates: Tensor, weights: Tensor, *, factors: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """sum_k w_k f_k u_k / sum_k w_k, added in float64.

    Args:
        updates: (K, P) float. A coordinate with a NaN becomes NaN, whatever its weight, and so does an infinite one
            of weight 0: leave such clients out (``finite_updates``), a weight of 0 is not enough.
        weights: (K,) finite, not negative, not all 0.
        factors: (K,) that shorten updates, of ``clip_factors``; None for ones.
        device: that computes; None for the updates' own.

    Returns:
        (P,) float32 (float64 for float64 updates), where the updates are.

    Raises:
        ShapeError: not (K, P), or weights or factors of another length.
        ConfigError: weights that are negative or not finite, or without a positive sum.
    """
    _check(updates)
    for name, tensor in (("weights", weights), ("factors", factors)):
        if tensor is not None and tensor.shape != updates.shape[:1]:
            raise ShapeError(f"{name} must be ({len(updates)},), got {tuple(tensor.shape)}")
    total = float(weights.double().sum())
    if not 0.0 < total < float("inf") or bool((weights < 0).any()):
        raise ConfigError(
            f"weights must be finite and not negative, with a positive sum; they add up to {total}"
        )
    shares = weights.double() / total
    if factors is not None:
        shares = shares * factors.to(shares)

    def part(columns: Tensor) -> Tensor:
        own = shares.to(columns.device)
        if takes_triton(columns):
            from wearfleet_cloud.kernels.robust import kernel  # noqa: PLC0415  only where Triton is

            return kernel.weighted_sum_triton(columns, own)
        return weighted_sum_direct(columns, own)

    return _joined(updates, part, device)


def coordinate_median(updates: Tensor, *, device: torch.device | None = None) -> Tensor:
    """Median of every coordinate; of an even number of updates the mean of the middle two.

    Fewer than half of the updates may be anything without moving a coordinate out of the range of the others.

    Args:
        updates: (K, P) float; a coordinate with a NaN becomes NaN, infinite values are ordered like any others.
        device: that computes; None for the updates' own.

    Returns:
        (P,) float32 (float64 for float64 updates), where the updates are.

    Raises:
        ShapeError: not (K, P).

    Source: Yin et al. 2018, arXiv:1803.01498, algorithm 1, option I; specs/federated.md 16.
    """
    _check(updates)

    def part(columns: Tensor) -> Tensor:
        if takes_triton(columns) and len(columns) <= _MOST_ORDERED:
            from wearfleet_cloud.kernels.robust import kernel  # noqa: PLC0415  only where Triton is

            return kernel.median_triton(columns)
        return median_direct(columns)

    return _joined(updates, part, device)


def trimmed_mean(updates: Tensor, trim: int, *, device: torch.device | None = None) -> Tensor:
    """Mean of every coordinate without its ``trim`` smallest and its ``trim`` largest values.

    Args:
        updates: (K, P) float; a coordinate with a NaN becomes NaN, infinite values are ordered like any others.
        trim: at least 0, below K / 2: floor(beta K) for a share of beta.
        device: that computes; None for the updates' own.

    Returns:
        (P,) float32 (float64 for float64 updates), where the updates are; added in float64.

    Raises:
        ShapeError: not (K, P).
        ConfigError: nothing would be left.

    Source: Yin et al. 2018, arXiv:1803.01498, algorithm 1, option II; specs/federated.md 16.
    """
    _check(updates)
    if not 0 <= 2 * trim < len(updates):
        raise ConfigError(
            f"of {len(updates)} updates 0 to {(len(updates) - 1) // 2} can be trimmed at each end, not {trim}"
        )

    def part(columns: Tensor) -> Tensor:
        if takes_triton(columns) and len(columns) <= _MOST_ORDERED:
            from wearfleet_cloud.kernels.robust import kernel  # noqa: PLC0415  only where Triton is

            return kernel.trimmed_mean_triton(columns, trim)
        return trimmed_mean_direct(columns, trim)

    return _joined(updates, part, device)


def squared_distances(updates: Tensor, *, device: torch.device | None = None) -> Tensor:
    """Squared distances between all pairs of updates, from their differences: what Krum ranks.

    Never |a|^2 + |b|^2 - 2 a b, which loses the distance of two updates that are nearly equal.

    Args:
        updates: (K, P) float. The distances of an update that is not finite are infinite or NaN. On a GPU differences
            are squared in float32: those above 1.8e19 count as infinite, those below 1e-23 as 0.
        device: that computes; None for the updates' own.

    Returns:
        (K, K) float64 symmetric, 0 on the diagonal, where the updates are.

    Raises:
        ShapeError: not (K, P).

    Source: Blanchard et al. 2017 (Krum), section 4; specs/federated.md 16.
    """
    _check(updates)

    def part(columns: Tensor) -> Tensor:
        if takes_triton(columns):
            from wearfleet_cloud.kernels.robust import kernel  # noqa: PLC0415  only where Triton is

            return kernel.squared_distances_triton(columns)
        return squared_distances_direct(columns)

    total = _added(updates, part, device)
    matrix = total if total.dim() == 2 else paired(total, len(updates))
    return matrix.fill_diagonal_(0.0).to(updates.device)


def squared_norms(updates: Tensor, *, device: torch.device | None = None) -> Tensor:
    """|u_k|^2 of every update, added in float64.

    Args:
        updates: (K, P) float.
        device: that computes; None for the updates' own.

    Returns:
        (K,) float64, where the updates are; NaN or infinite for an update that is not finite.

    Raises:
        ShapeError: not (K, P).
    """
    _check(updates)

    def part(columns: Tensor) -> Tensor:
        if takes_triton(columns):
            from wearfleet_cloud.kernels.robust import kernel  # noqa: PLC0415  only where Triton is

            return kernel.squared_norms_triton(columns)
        return squared_norms_direct(columns)

    return _added(updates, part, device).to(updates.device)


def clip_factors(updates: Tensor, bound: float, *, device: torch.device | None = None) -> Tensor:
    """min(1, bound / |u_k|): what brings every update to a length of at most ``bound``.

    Args:
        updates: (K, P) float. The factor of an infinite update is 0, that of one with a NaN is NaN.
        bound: above 0.
        device: that computes; None for the updates' own.

    Returns:
        (K,) float64; 1 for an update of length 0.

    Raises:
        ShapeError: not (K, P).
        ConfigError: the bound is not above 0.
    """
    if not bound > 0.0:
        raise ConfigError(f"the bound of a norm must be above 0, got {bound}")
    norms = squared_norms(updates, device=device).sqrt()
    return (bound / norms.clamp(min=1e-300)).clamp(max=1.0)


def finite_updates(updates: Tensor, *, device: torch.device | None = None) -> Tensor:
    """Which updates hold only finite numbers: ask before any rule, since a NaN is neither smaller nor larger.

    Args:
        updates: (K, P) float.
        device: that computes; None for the updates' own.

    Returns:
        (K,) bool, where the updates are.

    Raises:
        ShapeError: not (K, P).
    """
    _check(updates)
    if updates.dtype != torch.float64:  # the squares of all others have a finite sum in float64
        return squared_norms(updates, device=device).isfinite()
    wrong = _added(updates, lambda columns: columns.isfinite().logical_not().sum(dim=1), device)
    return (wrong == 0).to(updates.device)


def _check(updates: Tensor) -> None:
    if updates.dim() != 2 or 0 in updates.shape or not updates.is_floating_point():
        raise ShapeError(
            "updates must be float (clients, parameters), at least one each, got "
            f"{tuple(updates.shape)} {updates.dtype}"
        )


def _slices(updates: Tensor, device: torch.device | None) -> Iterator[Tensor]:
    """Columns of the updates on the device that computes; parameters lie side by side."""
    place = device or updates.device
    ready = place == updates.device and updates.stride(1) == 1
    if ready and takes_triton(updates) and len(updates) <= _MOST_ORDERED:
        yield updates  # the kernels need nothing beside it
        return
    budget = _SLICE_BYTES if place.type == "cuda" else _CACHE_BYTES
    width = max(1, budget // (len(updates) * updates.element_size()))
    for begin in range(0, updates.shape[1], width):
        moved = updates[:, begin : begin + width].to(place)
        yield moved if moved.stride(1) == 1 else moved.contiguous()


def _joined(updates: Tensor, part: Callable[[Tensor], Tensor], device: torch.device | None) -> Tensor:
    """A number for every column: (P,).

    All of them in one tensor: a tensor for each slice would lie in the gaps that the copies of slices leave behind, so
    that every next copy would need new memory.
    """
    dtype = torch.promote_types(updates.dtype, torch.float32)
    slices = _slices(updates, device)
    numbers = part(next(slices))
    if len(numbers) == updates.shape[1]:
        return numbers.to(updates.device, dtype)
    found = torch.empty(updates.shape[1:], dtype=dtype, device=updates.device)
    begin = 0
    for columns in slices:
        found[begin : begin + len(numbers)] = numbers
        begin += len(numbers)
        numbers = part(columns)
    found[begin:] = numbers
    return found


def _added(updates: Tensor, part: Callable[[Tensor], Tensor], device: torch.device | None) -> Tensor:
    """A sum over all columns, in float64."""
    slices = _slices(updates, device)
    total = part(next(slices))
    for columns in slices:
        total += part(columns)
    return total
