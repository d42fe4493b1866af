"""Triton kernels of the contrastive losses: similarities are made in tiles, used where they are made, made again."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wearfleet_cloud.kernels.operation import operation

__all__ = ["sigmoid_losses_triton", "softmax_statistics_triton"]

Slopes = Callable[[Tensor, int, int], None]
"""(slab, first row, rows): fills the slab."""
_PROGRAMS = 128  # about one for each processor of a GPU; fewer rows than that share their columns out
_SLAB = 256  # rows of a slab at least, work enough for a product


@triton.jit
def _similarities(
    x, y, scale_x, scale_y, i, j, M, N, F, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, DOT: tl.constexpr
):
    """Scaled inner products (BLOCK, BLOCK) of rows ``i`` and ``j`` of one problem."""
    s = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, F, BLOCK_F):
        column = begin + tl.arange(0, BLOCK_F)[None, :]
        at_x, at_y = x + i[:, None].to(tl.int64) * F + column, y + j[:, None].to(tl.int64) * F + column
        xi = tl.load(at_x, mask=(i < M)[:, None] & (column < F), other=0.0).to(tl.float32)
        yj = tl.load(at_y, mask=(j < N)[:, None] & (column < F), other=0.0).to(tl.float32)
        s = tl.dot(xi, tl.trans(yj), s, input_precision=DOT)
    rows = tl.load(scale_x + i, mask=i < M, other=0.0).to(tl.float32)
    columns = tl.load(scale_y + j, mask=j < N, other=0.0).to(tl.float32)
    return s * rows[:, None] * columns[None, :], rows, columns


@triton.jit
def _statistics(
    x,  # (P, M, F)
    y,  # (P, N, F)
    scale_x,  # (P, M)
    scale_y,  # (P, N)
    labels_x,  # (P, M)
    labels_y,  # (P, N)
    lse,  # (SPLITS, P, M) out
    positives,  # (SPLITS, P, M) out
    counts,  # (SPLITS, P, M) out
    largest,  # (SPLITS, P, M) out
    M,
    N,
    F,
    COLUMNS,  # of one split, a multiple of BLOCK
    WITHOUT_SELF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    DOT: tl.constexpr,
):
    problem, split = tl.program_id(0), tl.program_id(2)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(labels_x + problem * M + i, mask=i < M, other=-1)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    total, positive, count = (
        tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    )  # fmt: skip
    start_x, start_y = x + problem.to(tl.int64) * M * F, y + problem.to(tl.int64) * N * F
    for begin in range(split * COLUMNS, tl.minimum(split * COLUMNS + COLUMNS, N), BLOCK):
        j = begin + tl.arange(0, BLOCK)
        s, _, _ = _similarities(
            start_x, start_y, scale_x + problem * M, scale_y + problem * N, i, j, M, N, F, BLOCK, BLOCK_F, DOT
        )
        theirs = tl.load(labels_y + problem * N + j, mask=j < N, other=-1)
        compared = (theirs >= 0)[None, :] & (i < M)[:, None]
        most = tl.maximum(most, tl.max(tl.where(compared, s, -float("inf")), 1))
        if WITHOUT_SELF:
            compared = compared & (i[:, None] != j[None, :])
        same = compared & (mine[:, None] == theirs[None, :])
        positive += tl.sum(tl.where(same, s, 0.0), 1)
        count += tl.sum(same.to(tl.float32), 1)
        new = tl.maximum(top, tl.max(tl.where(compared, s, -float("inf")), 1))
        shift = tl.where(new == -float("inf"), 0.0, new)
        grown = tl.sum(tl.where(compared, tl.exp(tl.where(compared, s - shift[:, None], 0.0)), 0.0), 1)
        total = total * tl.exp(tl.where(top == -float("inf"), 0.0, top - shift)) + grown
        top = new
    place = (split * tl.num_programs(0) + problem) * M + i
    logarithm = tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), -float("inf"))
    tl.store(lse + place, logarithm, mask=i < M)
    tl.store(positives + place, positive, mask=i < M)
    tl.store(counts + place, count, mask=i < M)
    tl.store(largest + place, most, mask=i < M)


@triton.jit
def _softmax_slopes(
    x,  # (P, M, F)
    y,  # (P, N, F)
    scale_x,  # (P, M)
    scale_y,  # (P, N)
    labels_x,  # (P, M)
    labels_y,  # (P, N)
    lse,  # (P, M)
    by_lse,  # (P, M) gradient of the logarithms
    by_positives,  # (P, M) gradient of the sums
    slab,  # (P, R, N) out: derivatives by x_i . y_j of rows first ... first + R
    first,
    R,
    M,
    N,
    F,
    WITHOUT_SELF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    DOT: tl.constexpr,
):
    problem = tl.program_id(0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, j = first + row, tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    start_x, start_y = x + problem.to(tl.int64) * M * F, y + problem.to(tl.int64) * N * F
    s, rows, columns = _similarities(
        start_x, start_y, scale_x + problem * M, scale_y + problem * N, i, j, M, N, F, BLOCK, BLOCK_F, DOT
    )
    mine = tl.load(labels_x + problem * M + i, mask=i < M, other=-1)
    theirs = tl.load(labels_y + problem * N + j, mask=j < N, other=-1)
    compared = (theirs >= 0)[None, :] & (row < R)[:, None]
    if WITHOUT_SELF:
        compared = compared & (i[:, None] != j[None, :])
    norm = tl.load(lse + problem * M + i, mask=i < M, other=0.0)
    share = tl.exp(tl.where(compared, s - norm[:, None], -float("inf")))
    slope = tl.load(by_lse + problem * M + i, mask=i < M, other=0.0)[:, None] * share
    extra = tl.load(by_positives + problem * M + i, mask=i < M, other=0.0)[:, None]
    slope += tl.where(compared & (mine[:, None] == theirs[None, :]), extra, 0.0)
    offsets = (problem * R + row[:, None]).to(tl.int64) * N + j[None, :]
    out = (slope * rows[:, None] * columns[None, :]).to(slab.dtype.element_ty)
    tl.store(slab + offsets, out, mask=(row < R)[:, None] & (j < N)[None, :])


@triton.jit
def _decisions(s, bias, mine, theirs):
    """Of every pair: 1 with equal labels, else -1; minus that times its logit; whether both are present."""
    present = (theirs >= 0)[None, :] & (mine >= 0)[:, None]
    sign = tl.where(mine[:, None] == theirs[None, :], 1.0, -1.0)
    return sign, tl.where(present, -sign * (s + bias), 0.0), present


@triton.jit
def _softplus(values):
    """log(1 + e^v), small ones with all their digits: log(u) / (u - 1) does not see the rounding of u = 1 + e^v."""
    small = tl.exp(-tl.abs(values))
    grown = 1.0 + small
    exact = grown == 1.0
    ratio = tl.where(exact, 1.0, tl.log(grown) / tl.where(exact, 1.0, grown - 1.0))
    return tl.maximum(values, 0.0) + small * ratio


@triton.jit
def _sigmoid_losses(
    x,  # (P, M, F)
    y,  # (P, N, F)
    scale_x,  # (P, M)
    scale_y,  # (P, N)
    bias,  # (P,)
    labels_x,  # (P, M)
    labels_y,  # (P, N)
    losses,  # (SPLITS, P, M) out
    M,
    N,
    F,
    COLUMNS,  # of one split, a multiple of BLOCK
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    DOT: tl.constexpr,
):
    problem, split = tl.program_id(0), tl.program_id(2)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(labels_x + problem * M + i, mask=i < M, other=-1)
    shift = tl.load(bias + problem)
    start_x, start_y = x + problem.to(tl.int64) * M * F, y + problem.to(tl.int64) * N * F
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(split * COLUMNS, tl.minimum(split * COLUMNS + COLUMNS, N), BLOCK):
        j = begin + tl.arange(0, BLOCK)
        s, _, _ = _similarities(
            start_x, start_y, scale_x + problem * M, scale_y + problem * N, i, j, M, N, F, BLOCK, BLOCK_F, DOT
        )
        theirs = tl.load(labels_y + problem * N + j, mask=j < N, other=-1)
        _, against, present = _decisions(s, shift, mine, theirs)
        total += tl.sum(tl.where(present, _softplus(against), 0.0), 1)
    tl.store(losses + (split * tl.num_programs(0) + problem) * M + i, total, mask=i < M)


@triton.jit
def _sigmoid_slopes(
    x,  # (P, M, F)
    y,  # (P, N, F)
    scale_x,  # (P, M)
    scale_y,  # (P, N)
    bias,  # (P,)
    labels_x,  # (P, M)
    labels_y,  # (P, N)
    upstream,  # (P, M)
    slab,  # (P, R, N) out: derivatives by x_i . y_j of rows first ... first + R
    sums,  # (P, TILES_R, TILES_N) out: derivatives by the bias
    first,
    R,
    M,
    N,
    F,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    DOT: tl.constexpr,
):
    problem = tl.program_id(0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, j = first + row, tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    start_x, start_y = x + problem.to(tl.int64) * M * F, y + problem.to(tl.int64) * N * F
    s, rows, columns = _similarities(
        start_x, start_y, scale_x + problem * M, scale_y + problem * N, i, j, M, N, F, BLOCK, BLOCK_F, DOT
    )
    mine = tl.load(labels_x + problem * M + i, mask=(i < M) & (row < R), other=-1)
    theirs = tl.load(labels_y + problem * N + j, mask=j < N, other=-1)
    sign, against, present = _decisions(s, tl.load(bias + problem), mine, theirs)
    small = tl.exp(-tl.abs(against))
    chance = tl.where(against > 0.0, 1.0, small) / (1.0 + small)
    g = tl.load(upstream + problem * M + i, mask=i < M, other=0.0)[:, None]
    slope = tl.where(present, -sign * chance * g, 0.0)
    place = (problem * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(sums + place, tl.sum(slope))
    offsets = (problem * R + row[:, None]).to(tl.int64) * N + j[None, :]
    value = (slope * rows[:, None] * columns[None, :]).to(slab.dtype.element_ty)
    tl.store(slab + offsets, value, mask=(row < R)[:, None] & (j < N)[None, :])


def _blocks(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Tiles, and the product's arithmetic: TF32 multiplies numbers that were bfloat16 exactly, and only those."""
    dot = "tf32" if x.dtype == y.dtype == torch.bfloat16 else "ieee"
    if max(x.shape[1], y.shape[1]) <= 512:
        return {"BLOCK": 16, "BLOCK_F": 64, "DOT": dot, "num_warps": 2}
    return {"BLOCK": 64, "BLOCK_F": 32, "DOT": dot, "num_warps": 8}


def _streams(x: Tensor, y: Tensor, block: int) -> tuple[tuple[int, int, int], int]:
    """Problems, tiles of rows and splits of the columns, and the columns of a split."""
    (problems, rows, _), columns = x.shape, y.shape[1]
    tiles = triton.cdiv(rows, block)
    wanted = max(1, min(_PROGRAMS // (problems * tiles), triton.cdiv(columns, block)))
    each = triton.cdiv(triton.cdiv(columns, wanted), block) * block
    return (problems, tiles, triton.cdiv(columns, each)), each


def _softmax_forward(without_self: object, *tensors: Tensor) -> tuple[Tensor, ...]:
    tensors = tuple(tensor.contiguous() for tensor in tensors)
    x, y = tensors[:2]
    problems, rows, width = x.shape
    columns, blocks = y.shape[1], _blocks(x, y)
    grid, each = _streams(x, y, blocks["BLOCK"])
    splits = grid[2]
    found = [x.new_empty((splits, problems, rows), dtype=torch.float32) for _ in range(4)]
    _statistics[grid](*tensors, *found, rows, columns, width, each, WITHOUT_SELF=without_self, **blocks)
    lse, positives, counts, largest = found
    if splits == 1:
        return lse[0], positives[0], counts[0], largest[0], lse[0].clone()
    total = lse.logsumexp(0)
    return total, positives.sum(0), counts.sum(0), largest.amax(0), total.clone()


def _softmax_backward(without_self: object, needs: tuple[bool, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    x, y, scale_x, scale_y, labels_x, labels_y, _counts, _largest, lse, by_lse, by_positives = (
        tensor.contiguous() for tensor in tensors
    )
    blocks = _blocks(x, y)

    def slopes(part: Tensor, first: int, count: int) -> None:
        grid = (len(x), triton.cdiv(count, blocks["BLOCK"]), triton.cdiv(y.shape[1], blocks["BLOCK"]))
        _softmax_slopes[grid](
            x, y, scale_x, scale_y, labels_x, labels_y, lse, by_lse, by_positives, part, first, count,
            x.shape[1], y.shape[1], x.shape[2], WITHOUT_SELF=without_self, **blocks,
        )  # fmt: skip

    found = _by_slabs(x, y, scale_x, scale_y, slopes)
    return tuple(tensor for tensor, needed in zip(found, needs, strict=True) if needed)


def _by_slabs(x: Tensor, y: Tensor, scale_x: Tensor, scale_y: Tensor, slopes: Slopes) -> tuple[Tensor, ...]:
    """Gradients by both towers and their scales, from slabs of slopes: memory like that of the features."""
    problems, rows, width = x.shape
    columns = y.shape[1]
    height = min(rows, max(_SLAB, 2 * width))
    slab = x.new_empty((problems * height * columns,))
    by_x = x.new_empty(x.shape, dtype=torch.float32)
    by_y = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
    for first in range(0, rows, height):
        count = min(height, rows - first)
        part = slab[: problems * count * columns].view(problems, count, columns)
        slopes(part, first, count)
        by_x[:, first : first + count] = part @ y
        by_y += part.transpose(1, 2) @ x[:, first : first + count]
    by_scale_x = (by_x * x).sum(-1) / scale_x.float()
    by_scale_y = (by_y * y).sum(-1) / scale_y.float()
    return by_x.to(x.dtype), by_y.to(y.dtype), by_scale_x.to(scale_x.dtype), by_scale_y.to(scale_y.dtype)


def _sigmoid_forward(_settings: object, *tensors: Tensor) -> tuple[Tensor, ...]:
    tensors = tuple(tensor.contiguous() for tensor in tensors)
    x, y = tensors[:2]
    problems, rows, width = x.shape
    blocks = _blocks(x, y)
    grid, each = _streams(x, y, blocks["BLOCK"])
    losses = x.new_empty((grid[2], problems, rows), dtype=torch.float32)
    _sigmoid_losses[grid](*tensors, losses, rows, y.shape[1], width, each, **blocks)
    return (losses[0] if len(losses) == 1 else losses.sum(0),)


def _sigmoid_backward(_settings: object, needs: tuple[bool, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    *inputs, upstream = (tensor.contiguous() for tensor in tensors)
    x, y, scale_x, scale_y, bias = inputs[:5]
    problems, rows, width = x.shape
    blocks = _blocks(x, y)
    by_bias = torch.zeros(bias.shape, dtype=torch.float32, device=x.device)

    def slopes(part: Tensor, first: int, count: int) -> None:
        tiles = [triton.cdiv(size, blocks["BLOCK"]) for size in (count, y.shape[1])]
        sums = x.new_empty((problems, *tiles), dtype=torch.float32)
        _sigmoid_slopes[problems, *tiles](
            *inputs, upstream, part, sums, first, count, rows, y.shape[1], width, **blocks
        )
        by_bias.add_(sums.sum(dim=(1, 2)))

    found = (*_by_slabs(x, y, scale_x, scale_y, slopes), by_bias.to(bias.dtype))
    return tuple(tensor for tensor, needed in zip(found, needs, strict=True) if needed)


_softmax_operation = operation(_softmax_forward, _softmax_backward, values=2, differentiable=4, constants=2)
_sigmoid_operation = operation(_sigmoid_forward, _sigmoid_backward, values=1, differentiable=5)


def softmax_statistics_triton(
    x: Tensor,
    y: Tensor,
    scale_x: Tensor,
    scale_y: Tensor,
    labels_x: Tensor,
    labels_y: Tensor,
    without_self: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``softmax_statistics_reference``; the results are float32."""
    tensors = (tensor[None] for tensor in (x, y, scale_x, scale_y, labels_x, labels_y))
    lse, positives, counts, largest = _softmax_operation(without_self, *tensors)
    return lse[0], positives[0], counts[0], largest[0]


def sigmoid_losses_triton(
    x: Tensor,
    y: Tensor,
    scale_x: Tensor,
    scale_y: Tensor,
    bias: Tensor,
    labels_x: Tensor,
    labels_y: Tensor,
) -> Tensor:
    """As ``sigmoid_losses_reference``; the result is float32."""
    tensors = (tensor[None] for tensor in (x, y, scale_x, scale_y, bias, labels_x, labels_y))
    return _sigmoid_operation(None, *tensors)[0][0]
