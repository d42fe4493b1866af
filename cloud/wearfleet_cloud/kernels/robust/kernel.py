"""Triton kernels of robust aggregation: every update is read once, for distances once a tile of pairs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "median_triton",
    "squared_distances_triton",
    "squared_norms_triton",
    "trimmed_mean_triton",
    "weighted_sum_triton",
]

_MOST_SORTED = 64  # updates that one thread sorts; compiling more than these takes a minute
_TILE = 8192  # values that a program selects from
_CHUNK = 2048  # columns of a distance that are added in float32
_LAUNCH = 8192  # programs of a launch, whose sums lie side by side before they are added


@triton.constexpr_function
def _partner(row: int, run: int, apart: int, rows: int) -> int:
    """The row that is compared with this one when runs are merged: one ``apart`` away in the same pair, or itself."""
    begin = (
        apart % run
    )  # the first step of a merge compares all rows, the others leave out the ends of a pair
    for other in (row - apart, row + apart):
        low = min(row, other)
        if (
            low >= begin
            and (low - begin) // apart % 2 == 0
            and other < rows
            and row // (2 * run) == other // (2 * run)
        ):
            return other
    return row


@triton.jit
def _merged(rows, RUN: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr):
    """One step of merging pairs of ordered runs: of two rows ``APART`` away from each other the smaller comes first."""
    moved = rows[:0]
    for k in tl.static_range(ROWS):
        if _partner(k, RUN, APART, ROWS) > k:
            moved += (tl.minimum(rows[k], rows[k + APART]),)
        elif _partner(k, RUN, APART, ROWS) < k:
            moved += (tl.maximum(rows[k - APART], rows[k]),)
        else:
            moved += (rows[k],)
    return moved


@triton.jit
def _weighted_sum(
    updates,  # (K, P)
    weights,  # (K,) float64
    out,  # (P,) float32
    K,
    P,
    stride,  # between updates
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    total = tl.zeros((BLOCK_P,), tl.float64)
    for begin in range(0, K, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)[:, None]
        inside = (row < K) & (column < P)
        values = tl.load(updates + row.to(tl.int64) * stride + column, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(tl.load(weights + row, mask=row < K, other=0.0) * values, 0)
    tl.store(out + column, total.to(tl.float32)[None, :], mask=column < P)


@triton.jit
def _squared_distances(
    updates,  # (K, P)
    out,  # (CHUNKS, K, K) float64: sums over the columns of each chunk
    K,
    P,
    stride,  # between updates
    CHUNK: tl.constexpr,  # columns that are added in float32, a multiple of BLOCK_P
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tile_i, tile_j, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tile_j < tile_i:  # its mirror image writes both
        return
    i = tile_i * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tile_j * BLOCK_K + tl.arange(0, BLOCK_K)
    has_i, has_j = (i < K)[:, None, None], (j < K)[None, :, None]
    row_i = updates + i.to(tl.int64)[:, None, None] * stride
    row_j = updates + j.to(tl.int64)[None, :, None] * stride
    first = chunk.to(tl.int64) * CHUNK
    near = tl.zeros((BLOCK_K, BLOCK_K, BLOCK_P), tl.float32)
    for begin in range(first, tl.minimum(first + CHUNK, P), BLOCK_P):
        column = (begin + tl.arange(0, BLOCK_P))[None, None, :]
        a = tl.load(row_i + column, mask=has_i & (column < P), other=0.0).to(tl.float32)
        b = tl.load(row_j + column, mask=has_j & (column < P), other=0.0).to(tl.float32)
        away = a - b
        near += away * away
    total = tl.sum(near, 2).to(tl.float64)
    inside = (i < K)[:, None] & (j < K)[None, :]
    row, other = chunk.to(tl.int64) * K + i[:, None], chunk.to(tl.int64) * K + j[None, :]
    tl.store(out + row * K + j[None, :], total, mask=inside)
    tl.store(out + other * K + i[:, None], total, mask=inside)


@triton.jit
def _squared_norms(
    updates,  # (K, P)
    out,  # (K, CHUNKS) float64
    P,
    stride,  # between updates
    BLOCK_P: tl.constexpr,
):
    row, chunk = tl.program_id(0), tl.program_id(1)
    column = chunk.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    values = tl.load(updates + row.to(tl.int64) * stride + column, mask=column < P, other=0.0).to(tl.float64)
    tl.store(out + row * tl.num_programs(1) + chunk, tl.sum(values * values, 0))


@triton.jit(do_not_specialize=["K", "trim"])
def _network(
    updates,  # (K, P)
    out,  # (P,) float32
    K,  # above 3/4 ROWS, at most ROWS
    P,
    stride,  # between updates
    trim,  # values left out at each end, for the trimmed mean
    MEDIAN: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,  # ceil(log2(ROWS))
    BLOCK_P: tl.constexpr,
):
    """Batcher's odd-even merge sort; every row is a variable of its own, so nothing moves between threads."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    at, inside = updates + column, column < P
    wrong = tl.zeros((BLOCK_P,), tl.int1)
    rows = ()
    for k in tl.static_range(ROWS):
        here = inside
        if k >= ROWS - ROWS // 4:  # only these can be missing
            here = column < tl.where(k < K, P, 0)
        row = tl.load(at, mask=here, other=float("inf")).to(tl.float32)
        wrong = wrong | (row != row)  # noqa: PLR0124  NaN is not itself
        rows += (row,)  # type: ignore[assignment]
        at += stride
    for level in tl.static_range(LEVELS):
        for step in tl.static_range(level + 1):
            rows = _merged(rows, 1 << level, 1 << (level - step), ROWS)
    if MEDIAN:
        first, second = rows[0], rows[0]  # type: ignore[misc]
        for k in tl.static_range((ROWS - ROWS // 4) // 2, ROWS // 2 + 1):
            first = tl.where(k == (K - 1) // 2, rows[k], first)
            second = tl.where(k == K // 2, rows[k], second)
        result = _middle(first, second)
    else:
        total = tl.zeros((BLOCK_P,), tl.float64)
        for k in tl.static_range(ROWS):
            total += tl.where((k >= trim) & (k < K - trim), rows[k], 0.0).to(tl.float64)
        result = (total / (K - 2 * trim)).to(tl.float32)
    tl.store(out + column, tl.where(wrong, float("nan"), result), mask=inside)


@triton.jit
def _middle(first, second):
    """Mean of two values; of two equal ones exactly that, also where its half is not a float."""
    return tl.where(first == second, first, 0.5 * first + 0.5 * second)


@triton.jit
def _at_least(values, bound):
    """How many values of every column are at least its bound: in float32, which compares and adds in two pipes."""
    return tl.sum(tl.where(values >= bound[None, :], 1.0, 0.0), 0)


@triton.jit
def _float_of(key):
    """The float of a whole number of the same order; what lies below the floats counts as minus infinity."""
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(key < -0x7F800000, float("-inf"), value)


@triton.jit
def _refined(values, key, flip, rank, K):
    """Set one more bit of the key if that many values still lie below; NaN, above the floats, has none above it."""
    trial = key ^ flip
    return tl.where(_at_least(values, _float_of(trial)) >= (K - rank).to(tl.float32), trial, key)


@triton.jit(do_not_specialize=["K", "trim"])
def _selected(
    updates,  # (K, P)
    out,  # (P,) float32
    K,
    P,
    stride,  # between updates
    trim,  # values left out at each end, for the trimmed mean
    MEDIAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The values of two ranks, found bit by bit from the highest."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    row = tl.arange(0, BLOCK_K)[:, None]
    at = updates + row.to(tl.int64) * stride + tl.minimum(column, P - 1)
    values = tl.load(at, mask=row < K, other=float("nan")).to(tl.float32)
    wrong = tl.sum((values != values).to(tl.int32), 0) > BLOCK_K - K  # noqa: PLR0124  more NaN than padding
    low = tl.full((BLOCK_P,), -0x80000000, tl.int32)
    flip = low
    if MEDIAN:
        rank = (K - 1) // 2
        for _ in range(32):
            low = _refined(values, low, flip, rank, K)
            flip = (flip >> 1) & 0x7FFFFFFF
        first = _float_of(low)
        above = values > first[None, :]
        next_one = tl.min(tl.where(above, values, float("inf")), 0)
        until = K - tl.sum(above.to(tl.int32), 0)  # so many are at most the first
        result = _middle(first, tl.where(until > K // 2, first, next_one))
    else:
        high = low
        for _ in range(32):
            low = _refined(values, low, flip, trim, K)
            high = _refined(values, high, flip, K - 1 - trim, K)
            flip = (flip >> 1) & 0x7FFFFFFF
        first, last = _float_of(low), _float_of(high)
        between = (values > first[None, :]) & (values < last[None, :])
        total = tl.sum(tl.where(between, values, 0.0).to(tl.float64), 0)
        at_low = tl.sum((values <= first[None, :]).to(tl.int32), 0) - trim
        at_high = tl.sum((values >= last[None, :]).to(tl.int32), 0) - trim
        total += at_low * first.to(tl.float64) + at_high * last.to(tl.float64)
        result = tl.where(first == last, first, (total / (K - 2 * trim)).to(tl.float32))
    tl.store(out + column, tl.where(wrong, float("nan"), result)[None, :], mask=column < P)


def weighted_sum_triton(updates: Tensor, weights: Tensor) -> Tensor:
    """As ``weighted_sum_reference``, added in float64 and rounded once: (P,) float32."""
    count, size = updates.shape
    out = torch.empty((size,), dtype=torch.float32, device=updates.device)
    _weighted_sum[triton.cdiv(size, 512),](
        updates, weights.double().contiguous(), out, count, size, updates.stride(0),
        BLOCK_K=8, BLOCK_P=512, num_warps=4,
    )  # fmt: skip
    return out


def squared_distances_triton(updates: Tensor) -> Tensor:
    """As ``squared_distances_reference``, on differences, joined in float64: (K, K) float64."""
    count = len(updates)
    tiles = triton.cdiv(count, 16)
    chunks = max(1, _LAUNCH // tiles**2)
    total = updates.new_zeros((count, count), dtype=torch.float64)
    for part in updates.split(chunks * _CHUNK, dim=1):
        sums = part.new_empty((triton.cdiv(part.shape[1], _CHUNK), count, count), dtype=torch.float64)
        _squared_distances[tiles, tiles, len(sums)](
            part, sums, count, part.shape[1], part.stride(0), CHUNK=_CHUNK, BLOCK_K=16, BLOCK_P=32, num_warps=4
        )  # fmt: skip
        total += sums.sum(dim=0)
    return total


def squared_norms_triton(updates: Tensor) -> Tensor:
    """As ``squared_norms_reference``, added in float64: (K,) float64."""
    count, size = updates.shape
    chunks = triton.cdiv(size, 4096)
    parts = torch.empty((count, chunks), dtype=torch.float64, device=updates.device)
    _squared_norms[count, chunks](updates, parts, size, updates.stride(0), BLOCK_P=4096, num_warps=4)
    return parts.sum(dim=1)


def median_triton(updates: Tensor) -> Tensor:
    """As ``median_reference`` for at most 4096 updates: (P,) float32."""
    return _ordered(updates, 0, median=True)


def trimmed_mean_triton(updates: Tensor, trim: int) -> Tensor:
    """As ``trimmed_mean_reference`` for at most 4096 updates: (P,) float32."""
    return _ordered(updates, trim, median=False)


def _ordered(updates: Tensor, trim: int, *, median: bool) -> Tensor:
    count, size = updates.shape
    out = torch.empty((size,), dtype=torch.float32, device=updates.device)
    power = triton.next_power_of_2(count)
    if count <= _MOST_SORTED:
        step = max(1, power // 8)
        _network[triton.cdiv(size, 128),](
            updates, out, count, size, updates.stride(0), trim, MEDIAN=median,
            ROWS=triton.cdiv(count, step) * step, LEVELS=power.bit_length() - 1, BLOCK_P=128, num_warps=4,
        )  # fmt: skip
    else:
        wide = max(8, _TILE // power)
        _selected[triton.cdiv(size, wide),](
            updates, out, count, size, updates.stride(0), trim, MEDIAN=median,
            BLOCK_K=power, BLOCK_P=wide, num_warps=max(4, power * wide // 2048),
        )  # fmt: skip
    return out
