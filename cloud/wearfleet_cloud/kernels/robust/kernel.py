"""Triton kernels of robust aggregation: every slice of the updates is read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "MOST_UPDATES",
    "median_triton",
    "squared_distances_triton",
    "squared_norms_triton",
    "trimmed_mean_triton",
    "weighted_sum_triton",
]

MOST_UPDATES = 4096  # a coordinate of all updates must fit into the registers of one program
_TILE = 8192


@triton.jit
def _weighted_sum(
    updates,  # (K, P)
    weights,  # (K,) float64
    out,  # (P,) float64
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
    tl.store(out + column, total[None, :], mask=column < P)


@triton.jit
def _keys(values, inside):
    """Whole numbers that are ordered like the floats; rows that are not there come last."""
    bits = values.to(tl.uint32, bitcast=True)
    negative = bits >> 31
    keys = bits ^ tl.where(negative == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return tl.where(inside, keys, 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _values(keys):
    """The floats that ``_keys`` came from."""
    negative = keys >> 31
    bits = keys ^ tl.where(negative == 1, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _select(keys, rank, BLOCK_P: tl.constexpr):
    """The key of the given rank (from 0) in every column, found bit by bit from the highest."""
    found = tl.zeros((BLOCK_P,), tl.uint32)
    bit = tl.full((BLOCK_P,), 0x80000000, tl.uint32)
    for _ in range(32):
        trial = found | bit
        below = tl.sum((keys < trial[None, :]).to(tl.int32), 0)
        found = tl.where(below <= rank, trial, found)
        bit = bit >> 1
    return found


@triton.jit
def _order_statistics(
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
    column = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    row = tl.arange(0, BLOCK_K)[:, None]
    inside = (row < K) & (column < P)
    values = tl.load(updates + row.to(tl.int64) * stride + column, mask=inside, other=0.0).to(tl.float32)
    wrong = tl.sum((values != values).to(tl.int32), 0) > 0  # noqa: PLR0124  NaN is not itself
    keys = _keys(values + 0.0, row < K)
    if MEDIAN:
        low = _select(keys, (K - 1) // 2, BLOCK_P)
        equal = tl.sum((keys <= low[None, :]).to(tl.int32), 0)
        above = tl.where(keys > low[None, :], keys, 0xFFFFFFFF).to(tl.uint32)
        next_one = _values(_least(above))
        first = _values(low)
        second = tl.where(equal > K // 2, first, next_one)
        result = 0.5 * first + 0.5 * second
    else:
        low, high = _select(keys, trim, BLOCK_P), _select(keys, K - 1 - trim, BLOCK_P)
        between = (keys > low[None, :]) & (keys < high[None, :])
        total = tl.sum(tl.where(between, values, 0.0).to(tl.float64), 0)
        at_low = tl.sum((keys <= low[None, :]).to(tl.int32), 0) - trim
        at_high = K - trim - tl.sum((keys < high[None, :]).to(tl.int32), 0)
        total += at_low * _values(low).to(tl.float64) + at_high * _values(high).to(tl.float64)
        result = tl.where(low == high, _values(low), (total / (K - 2 * trim)).to(tl.float32))
    result = tl.where(wrong, float("nan"), result)
    tl.store(out + column, result[None, :], mask=column < P)


@triton.jit
def _least(keys):
    """Smallest key of every column; signed numbers, because not every device orders unsigned ones in a reduction."""
    signed = (keys ^ 0x80000000).to(tl.int32, bitcast=True)
    return tl.min(signed, 0).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _squared_distances(
    updates,  # (K, P)
    out,  # (SPLITS, K, K) float64: partial sums of the tiles on and above the diagonal
    K,
    P,
    stride,  # between updates
    COLUMNS,  # of one split, a multiple of BLOCK_P
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tile_i, tile_j, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tile_j < tile_i:
        return
    i, j = tile_i * BLOCK_K + tl.arange(0, BLOCK_K), tile_j * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK_K), tl.float64)
    for begin in range(split * COLUMNS, tl.minimum(split * COLUMNS + COLUMNS, P), BLOCK_P):
        column = (begin + tl.arange(0, BLOCK_P))[None, :]
        at_i, at_j = (
            updates + i[:, None].to(tl.int64) * stride + column,
            updates + j[:, None].to(tl.int64) * stride + column,
        )
        a = tl.load(at_i, mask=(i < K)[:, None] & (column < P), other=0.0).to(tl.float32)
        b = tl.load(at_j, mask=(j < K)[:, None] & (column < P), other=0.0).to(tl.float32)
        away = a[:, None, :] - b[None, :, :]
        total += tl.sum(away * away, 2).to(tl.float64)
    place = out + (split * K + i[:, None]).to(tl.int64) * K + j[None, :]
    tl.store(place, total, mask=(i < K)[:, None] & (j < K)[None, :])


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


def weighted_sum_triton(updates: Tensor, weights: Tensor) -> Tensor:
    """As ``weighted_sum_reference``, added in float64: (P,) float64."""
    count, size = updates.shape
    out = torch.empty((size,), dtype=torch.float64, device=updates.device)
    _weighted_sum[triton.cdiv(size, 512),](
        updates,
        weights.double().contiguous(),
        out,
        count,
        size,
        updates.stride(0),
        BLOCK_K=8,
        BLOCK_P=512,
        num_warps=4,
    )
    return out


def median_triton(updates: Tensor) -> Tensor:
    """As ``median_reference`` for at most ``MOST_UPDATES`` updates: (P,) float32."""
    return _ordered(updates, 0, median=True)


def trimmed_mean_triton(updates: Tensor, trim: int) -> Tensor:
    """As ``trimmed_mean_reference`` for at most ``MOST_UPDATES`` updates: (P,) float32."""
    return _ordered(updates, trim, median=False)


def _ordered(updates: Tensor, trim: int, *, median: bool) -> Tensor:
    count, size = updates.shape
    high = triton.next_power_of_2(count)
    wide = max(8, min(512, _TILE // high))
    out = torch.empty((size,), dtype=torch.float32, device=updates.device)
    _order_statistics[triton.cdiv(size, wide),](
        updates, out, count, size, updates.stride(0), trim, MEDIAN=median, BLOCK_K=high, BLOCK_P=wide,
        num_warps=4 if high * wide <= _TILE else 8 if high <= 2048 else 16,
    )  # fmt: skip
    return out


def squared_distances_triton(updates: Tensor) -> Tensor:
    """As ``squared_distances_reference``, on differences, joined in float64: (K, K) float64."""
    count, size = updates.shape
    tiles = triton.cdiv(count, 16)
    splits = max(1, min(triton.cdiv(size, 2048), 2048 // (tiles * tiles), 64))
    columns = triton.cdiv(triton.cdiv(size, splits), 32) * 32
    splits = triton.cdiv(size, columns)
    parts = torch.zeros((splits, count, count), dtype=torch.float64, device=updates.device)
    _squared_distances[tiles, tiles, splits](
        updates, parts, count, size, updates.stride(0), columns, BLOCK_K=16, BLOCK_P=32, num_warps=4
    )
    upper = parts.sum(dim=0).triu(1)
    return upper + upper.T


def squared_norms_triton(updates: Tensor) -> Tensor:
    """As ``squared_norms_reference``, added in float64: (K,) float64."""
    count, size = updates.shape
    chunks = triton.cdiv(size, 4096)
    parts = torch.empty((count, chunks), dtype=torch.float64, device=updates.device)
    _squared_norms[count, chunks](updates, parts, size, updates.stride(0), BLOCK_P=4096, num_warps=4)
    return parts.sum(dim=1)
