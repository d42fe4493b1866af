"""Triton kernels of the CORAL penalty: centring, Gram tiles squared where they are made, spread of covariances."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wearfleet_cloud.kernels.operation import operation

__all__ = ["coral_penalty_triton"]


@dataclass(frozen=True, slots=True)
class _Form:
    domains: int
    gram: bool


@triton.jit
def _centre(
    features,  # (P D, B, F)
    weight,  # (P D, B)
    rows_out,  # (P D, B, F) out: sqrt(w / (W - 1)) (z - mean)
    means,  # (P D, F) out
    B,
    F,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    group = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    sums = tl.zeros((BLOCK_B, BLOCK_F), tl.float32)
    totals = tl.zeros((BLOCK_B,), tl.float32)
    for begin in range(0, B, BLOCK_B):
        window = begin + tl.arange(0, BLOCK_B)
        w = tl.load(weight + group * B + window, mask=window < B, other=0.0).to(tl.float32)
        offsets = (group * B + window[:, None]).to(tl.int64) * F + column
        z = tl.load(features + offsets, mask=(w > 0.0)[:, None] & (column < F), other=0.0).to(tl.float32)
        sums += w[:, None] * z
        totals += w
    total = tl.sum(totals, 0)
    mean = (tl.sum(sums, 0) / total)[None, :]
    tl.store(means + group * F + column, mean, mask=column < F)
    for begin in range(0, B, BLOCK_B):
        window = begin + tl.arange(0, BLOCK_B)
        w = tl.load(weight + group * B + window, mask=window < B, other=0.0).to(tl.float32)
        offsets = (group * B + window[:, None]).to(tl.int64) * F + column
        present = (w > 0.0)[:, None] & (column < F)
        z = tl.load(features + offsets, mask=present, other=0.0).to(tl.float32)
        x = tl.where(present, tl.sqrt(w / (total - 1.0))[:, None] * (z - mean), 0.0)
        tl.store(rows_out + offsets, x, mask=(window < B)[:, None] & (column < F))


@triton.jit
def _uncentre(
    by_rows,  # (P D, B, F): gradient by the centred rows
    by_means,  # (P D, F)
    weight,  # (P D, B)
    by_features,  # (P D, B, F) out
    B,
    F,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The mean's own share of the rows' gradient is 0: it is a product with the weighted sum of centred rows."""
    group = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    totals = tl.zeros((BLOCK_B,), tl.float32)
    for begin in range(0, B, BLOCK_B):
        window = begin + tl.arange(0, BLOCK_B)
        totals += tl.load(weight + group * B + window, mask=window < B, other=0.0).to(tl.float32)
    total = tl.sum(totals, 0)
    common = tl.load(by_means + group * F + column, mask=column < F, other=0.0)
    for begin in range(0, B, BLOCK_B):
        window = begin + tl.arange(0, BLOCK_B)
        w = tl.load(weight + group * B + window, mask=window < B, other=0.0).to(tl.float32)
        offsets = (group * B + window[:, None]).to(tl.int64) * F + column
        inside = (window < B)[:, None] & (column < F)
        g = tl.load(by_rows + offsets, mask=inside, other=0.0)
        out = tl.sqrt(w / (total - 1.0))[:, None] * g + (w / total)[:, None] * common
        tl.store(by_features + offsets, out.to(by_features.dtype.element_ty), mask=inside)


@triton.jit
def _products(x, i, j, N, F, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr):
    """Inner products (BLOCK, BLOCK) of rows ``i`` and ``j`` of one problem."""
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, F, BLOCK_F):
        column = begin + tl.arange(0, BLOCK_F)[None, :]
        at_i, at_j = x + i[:, None].to(tl.int64) * F + column, x + j[:, None].to(tl.int64) * F + column
        xi = tl.load(at_i, mask=(i < N)[:, None] & (column < F), other=0.0)
        xj = tl.load(at_j, mask=(j < N)[:, None] & (column < F), other=0.0)
        products = tl.dot(xi, tl.trans(xj), products, input_precision="ieee")
    return products


@triton.jit
def _gram(
    x,  # (P, N, F) centred rows
    sums,  # (P, T, T) float64 out: zero below the diagonal
    N,
    B,
    F,
    inner,  # what the square of a product counts within a domain; across it counts -1
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    problem, row, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.num_programs(1)
    place = sums + (problem * tiles + row) * tiles + column
    if column < row:
        tl.store(place, 0.0)
    else:
        i, j = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
        k = _products(x + problem.to(tl.int64) * N * F, i, j, N, F, BLOCK, BLOCK_F).to(tl.float64)
        counts = tl.where((i // B)[:, None] == (j // B)[None, :], inner, -1.0).to(tl.float64)
        tl.store(place, tl.sum(counts * k * k) * tl.where(column > row, 2.0, 1.0))


@triton.jit
def _gram_slopes(
    x,  # (P, N, F)
    scale,  # (P,)
    slab,  # (P, R, N) out: derivatives by the products of rows first ... first + R
    first,
    R,
    N,
    B,
    F,
    inner,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    problem = tl.program_id(0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, j = first + row, tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    k = _products(x + problem.to(tl.int64) * N * F, i, j, N, F, BLOCK, BLOCK_F)
    counts = tl.where((i // B)[:, None] == (j // B)[None, :], inner, -1.0)
    offsets = (problem * R + row[:, None]).to(tl.int64) * N + j[None, :]
    tl.store(
        slab + offsets, tl.load(scale + problem) * counts * k, mask=(row < R)[:, None] & (j < N)[None, :]
    )


@triton.jit
def _spread(
    covariances,  # (P, D, E): in, and out minus their mean over D
    sums,  # (P, CHUNKS) out: squared distances to the mean
    E,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    problem, chunk = tl.program_id(0), tl.program_id(1)
    entry = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = covariances + problem.to(tl.int64) * D * E + entry
    mean = tl.zeros((BLOCK,), tl.float32)
    for domain in range(D):
        mean += tl.load(start + domain * E.to(tl.int64), mask=entry < E, other=0.0)
    mean /= D
    total = tl.zeros((BLOCK,), tl.float32)
    for domain in range(D):
        place = start + domain * E.to(tl.int64)
        away = tl.load(place, mask=entry < E, other=0.0) - mean
        total += away * away
        tl.store(place, away, mask=entry < E)
    tl.store(sums + problem * tl.num_programs(1) + chunk, tl.sum(total, 0))


def _blocks(windows: int) -> dict[str, int]:
    """Small tiles where there are few windows, so that more programs share the work."""
    if windows <= 256:
        return {"BLOCK": 16, "BLOCK_F": 64, "num_warps": 2}
    return {"BLOCK": 32 if windows <= 2048 else 64, "BLOCK_F": 32, "num_warps": 4 if windows <= 2048 else 8}


def _launch_forward(form: object, features: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    assert isinstance(form, _Form)
    problems, windows, width = features.shape
    size, domains = windows // form.domains, form.domains
    x = features.new_empty((problems, windows, width), dtype=torch.float32)
    means = features.new_empty((problems, domains, width), dtype=torch.float32)
    _centre[problems * domains, triton.cdiv(width, 64)](
        features.contiguous(), weight.contiguous(), x, means, size, width, BLOCK_B=32, BLOCK_F=64, num_warps=4
    )
    pairs = domains * (domains - 1) / 2
    away = means - means.mean(dim=1, keepdim=True)
    value = domains * away.square().sum(dim=(1, 2)) / (width * pairs)
    kept, sums = _gram_sums(form, x, size) if form.gram else _covariance_sums(form, x, size)
    return value + sums.clamp(min=0.0) / (width**2 * pairs), x, away, kept


def _gram_sums(form: _Form, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    problems, windows, width = x.shape
    blocks = _blocks(windows)
    tiles = triton.cdiv(windows, blocks["BLOCK"])
    sums = x.new_empty((problems, tiles, tiles), dtype=torch.float64)
    _gram[problems, tiles, tiles](x, sums, windows, size, width, form.domains - 1.0, **blocks)
    return x.new_empty((problems, 1)), sums.sum(dim=(1, 2)).float()


def _covariance_sums(form: _Form, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    problems, _, width = x.shape
    rows = x.view(problems * form.domains, size, width)
    spread = (rows.transpose(1, 2) @ rows).view(problems, form.domains, width * width)
    chunks = triton.cdiv(width * width, 1024)
    sums = x.new_empty((problems, chunks))
    _spread[problems, chunks](spread, sums, width * width, D=form.domains, BLOCK=1024, num_warps=4)
    return spread, form.domains * sums.sum(dim=1)


def _launch_backward(
    form: object,
    _needs: tuple[bool, ...],
    features: Tensor,
    weight: Tensor,
    x: Tensor,
    away: Tensor,
    kept: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, ...]:
    assert isinstance(form, _Form)
    problems, windows, width = features.shape
    size, domains = windows // form.domains, form.domains
    pairs = domains * (domains - 1) / 2
    scale = (gradient / (width**2 * pairs)).contiguous()
    if form.gram:
        by_rows = _by_gram(form, x, size, 4.0 * scale)
    else:
        spread = kept.view(problems * domains, width, width)
        by_rows = x.view(problems * domains, size, width) @ spread
        by_rows = by_rows.view(problems, windows, width) * (4.0 * domains * scale)[:, None, None]
    by_means = away * (2.0 * domains / (width * pairs) * gradient)[:, None, None]
    found = features.new_empty(features.shape)
    _uncentre[problems * domains, triton.cdiv(width, 64)](
        by_rows,
        by_means.contiguous(),
        weight.contiguous(),
        found,
        size,
        width,
        BLOCK_B=32,
        BLOCK_F=64,
        num_warps=4,
    )
    return (found,)


def _by_gram(form: _Form, x: Tensor, size: int, scale: Tensor) -> Tensor:
    """Products with the slopes, in slabs of at most F rows: no more memory than the features take."""
    problems, windows, width = x.shape
    blocks = _blocks(windows)
    rows = min(windows, triton.cdiv(max(width, 64), blocks["BLOCK"]) * blocks["BLOCK"])
    slab, by_rows = x.new_empty((problems * rows * windows,)), x.new_empty(x.shape)
    for first in range(0, windows, rows):
        count = min(rows, windows - first)
        part = slab[: problems * count * windows].view(problems, count, windows)
        _gram_slopes[problems, triton.cdiv(count, blocks["BLOCK"]), triton.cdiv(windows, blocks["BLOCK"])](
            x, scale, part, first, count, windows, size, width, form.domains - 1.0, **blocks
        )
        by_rows[:, first : first + count] = part @ x
    return by_rows


_coral = operation(_launch_forward, _launch_backward, values=1, differentiable=1)


def coral_penalty_triton(features: Tensor, weight: Tensor | None, *, gram: bool) -> Tensor:
    """As ``coral_penalty_reference``, with inner products or with covariances; the result is float32."""
    domains, windows, width = features.shape
    if weight is None:
        weight = torch.ones((domains, windows), dtype=torch.float32, device=features.device)
    flat = features.reshape(1, domains * windows, width)
    return _coral(_Form(domains, gram), flat, weight.reshape(1, -1))[0][0]
