"""Triton kernels of the margin losses: one row of probabilities serves all labels, gradients are recomputed."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wearfleet_cloud.kernels.margin.reference import AGGREGATIONS, Aggregation
from wearfleet_cloud.kernels.operation import operation

__all__ = ["MOST_CLASSES", "MOST_LOGITS", "large_margin_triton", "replaced_cross_entropy_triton"]

MOST_CLASSES = 64  # of the large margin: the Gram matrix is held by every program
MOST_LOGITS = 32_768  # of the replaced cross-entropy: a row must fit into the registers of one program
_MEAN: tl.constexpr = tl.constexpr(0)
_SMALLEST: tl.constexpr = tl.constexpr(1)


@dataclass(frozen=True, slots=True)
class _Form:
    gamma: float
    top_k: int
    aggregation: Aggregation
    floor: float


@triton.jit
def _probabilities(logits, rows, inside, K, BLOCK_K: tl.constexpr):
    classes = tl.arange(0, BLOCK_K)[None, :]
    live = inside[:, None] & (classes < K)
    offsets = rows[:, None].to(tl.int64) * K + classes
    values = tl.load(logits + offsets, mask=live, other=-float("inf")).to(tl.float32)
    values = tl.where(inside[:, None], values, 0.0)
    p = tl.exp(values - tl.max(values, 1)[:, None])
    return tl.where(live, p / tl.sum(p, 1)[:, None], 0.0)


@triton.jit
def _geometry(p, gram, BLOCK_K: tl.constexpr):
    """What all labels of a window share, with the row of its most probable class as the origin of the classifier.

    Products of every row with that of the most probable class (M, BLOCK_K), square of the latter (M, 1); from the
    origin: squared distances of every row to the mean row and products with it (M, BLOCK_K), square of it (M, 1).
    """
    classes = tl.arange(0, BLOCK_K)
    same = classes[:, None] == classes[None, :]
    best = tl.max(p, 1)[:, None]
    first = tl.min(tl.where(p == best, classes[None, :], BLOCK_K), 1)[:, None]
    top = classes[None, :] == first
    rest = tl.where(top, 0.0, p)
    to_top = tl.dot(top.to(tl.float32), gram, input_precision="ieee")
    length = tl.sum(tl.where(top, to_top, 0.0), 1)[:, None]
    q = tl.dot(rest, gram, input_precision="ieee") - to_top * tl.sum(rest, 1)[:, None]
    q -= tl.sum(tl.where(top, q, 0.0), 1)[:, None]
    s = tl.sum(rest * q, 1)[:, None]
    squares = (tl.sum(tl.where(same, gram, 0.0), 0)[None, :] - 2.0 * to_top + length) - 2.0 * q + s
    return to_top, length, squares, q, s


@triton.jit
def _distances(p, gram, to_top, length, squares, q, s, hot, floor):
    """Distance to the border with every class (M, BLOCK_K), and one over its norm."""
    own = tl.sum(hot * p, 1)[:, None]
    own_q = tl.sum(hot * q, 1)[:, None]
    own_square = tl.sum(hot * squares, 1)[:, None]
    own_top = tl.sum(hot * to_top, 1)[:, None]
    mixed = (tl.dot(hot, gram, input_precision="ieee") - own_top) - (to_top - length) - q - (own_q - s)
    square = own * own * own_square + p * p * squares - 2.0 * own * p * mixed
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.maximum(square, 0.0)) + 1e-8, floor)
    return (own - p) * inverse, inverse


@triton.jit
def _judge(
    p,
    gram,
    to_top,
    length,
    squares,
    q,
    s,
    label,
    K,
    gamma,
    floor,
    TOP: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loss (M,) by one label, and its gradient by the probabilities (M, BLOCK_K)."""
    classes = tl.arange(0, BLOCK_K)[None, :]
    hot = (label[:, None] == classes).to(tl.float32)
    dist, inverse = _distances(p, gram, to_top, length, squares, q, s, hot, floor)
    left = tl.where((classes < K) & (hot == 0.0), p, -1.0)
    total = tl.sum(0.0 * p, 1)
    if KIND == _SMALLEST:
        total += float("inf")
    pull = 0.0 * p  # share of every competitor in the gradient
    for _ in range(TOP):
        best = tl.max(left, 1)[:, None]
        first = tl.min(tl.where(left == best, classes, BLOCK_K), 1)[:, None]
        chosen = classes == first
        left = tl.where(chosen, -2.0, left)
        here = tl.sum(tl.where(chosen, dist, 0.0), 1)
        if KIND == _MEAN:
            total += here / TOP
            pull += tl.where(chosen, inverse / TOP, 0.0)
        elif KIND == _SMALLEST:
            smaller = here < total
            total = tl.where(smaller, here, total)
            pull = tl.where(smaller[:, None], tl.where(chosen, inverse, 0.0), pull)
        else:
            total += tl.minimum(tl.maximum(here, -3.0 * gamma), gamma) / TOP
            free = (here > -3.0 * gamma) & (here < gamma)
            pull += tl.where(chosen & free[:, None], inverse / TOP, 0.0)
    if KIND <= _SMALLEST:
        free = (total > -3.0 * gamma) & (total < gamma)
        pull = tl.where(free[:, None], pull, 0.0)
        total = tl.minimum(tl.maximum(total, -3.0 * gamma), gamma)
    return -total, pull - hot * tl.sum(pull, 1)[:, None]


@triton.jit
def _large_margin(
    logits,  # (G, N, K)
    gram,  # (G, K, K)
    labels,  # (G, N, J)
    upstream,  # (G, N, J), backward only
    losses,  # (G, N, J) out, forward only
    grad_logits,  # (G, N, K) out, backward only
    N,
    K,
    gamma,
    floor,
    J: tl.constexpr,
    TOP: tl.constexpr,
    KIND: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = tl.program_id(0)
    window = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = window < N
    rows = group * N + tl.where(inside, window, 0)
    first, second = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_K)[None, :]
    place = gram + group * K * K + first * K + second
    matrix = tl.load(place, mask=(first < K) & (second < K), other=0.0).to(tl.float32)
    p = _probabilities(logits, rows, inside, K, BLOCK_K)
    to_top, length, squares, q, s = _geometry(p, matrix, BLOCK_K)
    slope = 0.0 * p
    for number in tl.static_range(J):
        label = tl.load(labels + rows * J + number, mask=inside, other=0)
        loss, by_p = _judge(
            p, matrix, to_top, length, squares, q, s, label, K, gamma, floor, TOP, KIND, BLOCK_K
        )
        if BACKWARD:
            slope += (
                tl.load(upstream + rows * J + number, mask=inside, other=0.0).to(tl.float32)[:, None] * by_p
            )
        else:
            tl.store(losses + rows * J + number, loss, mask=inside)
    if BACKWARD:
        by_l = p * (slope - tl.sum(p * slope, 1)[:, None])
        place = grad_logits + rows[:, None].to(tl.int64) * K + second
        tl.store(place, by_l.to(grad_logits.dtype.element_ty), mask=inside[:, None] & (second < K))


def _launch(
    form: _Form, logits: Tensor, gram: Tensor, labels: Tensor, upstream: Tensor | None, out: Tensor
) -> None:
    problems, windows, classes = logits.shape
    wide = max(16, triton.next_power_of_2(classes))
    rows = 16 if windows <= 4096 or wide > 16 else 32  # 32 windows of 32 classes would spill registers
    _large_margin[problems, triton.cdiv(windows, rows)](
        logits.contiguous(), gram.contiguous(), labels.contiguous(), upstream, out, out,
        windows, classes, form.gamma, form.floor, J=labels.shape[-1], TOP=form.top_k,
        KIND=AGGREGATIONS.index(form.aggregation), BACKWARD=upstream is not None,
        BLOCK_M=rows, BLOCK_K=wide, num_warps=4 if wide <= 32 else 8,
    )  # fmt: skip


def _margin_forward(form: _Form, logits: Tensor, gram: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    losses = gram.new_empty(labels.shape)
    _launch(form, logits, gram, labels, None, losses)
    return (losses,)


def _margin_backward(
    form: _Form, _needs: tuple[bool, ...], logits: Tensor, gram: Tensor, labels: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    by_logits = logits.new_empty(logits.shape)
    _launch(form, logits, gram, labels, gradient.contiguous(), by_logits)
    return (by_logits,)


_large_margin_operation = operation(_margin_forward, _margin_backward, values=1, differentiable=1)


def large_margin_triton(
    logits: Tensor,
    gram: Tensor,
    labels: Tensor,
    gamma: float,
    top_k: int,
    aggregation: Aggregation,
    floor: float,
) -> Tensor:
    """As ``large_margin_closed`` for at most ``MOST_CLASSES`` classes; the result is float32."""
    form = _Form(gamma, top_k, aggregation, floor)
    return _large_margin_operation(form, logits[None], gram.detach().float()[None], labels[None])[0][0]


@triton.jit
def _replaced(
    logits,  # (N, K)
    target,  # (N,)
    labels,  # (N,)
    lse,  # (N,): out forward, in backward
    upstream,  # (N,), backward only
    out,  # (N,) losses, or (N, K) gradient
    grad_target,  # (N,) out, backward only
    N,
    K,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    rows = tl.where(inside, rows, 0)
    classes = tl.arange(0, BLOCK_K)[None, :]
    live = inside[:, None] & (classes < K)
    offsets = rows[:, None].to(tl.int64) * K + classes
    own = tl.load(target + rows, mask=inside, other=0.0).to(tl.float32)
    hot = tl.load(labels + rows, mask=inside, other=0)[:, None] == classes
    values = tl.load(logits + offsets, mask=live, other=-float("inf")).to(tl.float32)
    values = tl.where(hot, own[:, None], values)
    if BACKWARD:
        g = tl.load(upstream + rows, mask=inside, other=0.0).to(tl.float32)
        p = tl.exp(values - tl.load(lse + rows, mask=inside, other=0.0)[:, None])
        tl.store(out + offsets, (g[:, None] * tl.where(hot, 0.0, p)).to(out.dtype.element_ty), mask=live)
        mine = tl.sum(tl.where(hot, p, 0.0), 1)
        tl.store(grad_target + rows, (g * (mine - 1.0)).to(grad_target.dtype.element_ty), mask=inside)
    else:
        top = tl.max(values, 1)
        total = top + tl.log(tl.sum(tl.exp(values - top[:, None]), 1))
        tl.store(lse + rows, total, mask=inside)
        tl.store(out + rows, total - own, mask=inside)


def _blocks(rows: int, classes: int) -> dict[str, int]:
    width = triton.next_power_of_2(classes)
    height = max(1, min(triton.next_power_of_2(rows), 2048 // width))
    return {
        "BLOCK_M": height,
        "BLOCK_K": width,
        "num_warps": 4 if width <= 4096 else 8 if width <= 16_384 else 16,
    }


def _replaced_forward(
    _settings: object, logits: Tensor, target: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    problems, windows, classes = logits.shape
    losses, lse = (logits.new_empty((problems, windows), dtype=torch.float32) for _ in range(2))
    blocks = _blocks(problems * windows, classes)
    _replaced[triton.cdiv(problems * windows, blocks["BLOCK_M"]),](
        logits.contiguous(), target.contiguous(), labels.contiguous(), lse, None, losses, None,
        problems * windows, classes, BACKWARD=False, **blocks,
    )  # fmt: skip
    return losses, lse


def _replaced_backward(
    _settings: object,
    needs: tuple[bool, ...],
    logits: Tensor,
    target: Tensor,
    labels: Tensor,
    lse: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, ...]:
    problems, windows, classes = logits.shape
    found = logits.new_empty(logits.shape), target.new_empty(target.shape)
    blocks = _blocks(problems * windows, classes)
    _replaced[triton.cdiv(problems * windows, blocks["BLOCK_M"]),](
        logits.contiguous(), target.contiguous(), labels.contiguous(), lse, gradient.contiguous(), *found,
        problems * windows, classes, BACKWARD=True, **blocks,
    )  # fmt: skip
    return tuple(tensor for tensor, needed in zip(found, needs, strict=True) if needed)


_replaced_operation = operation(_replaced_forward, _replaced_backward, values=1, differentiable=2)


def replaced_cross_entropy_triton(logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """As ``replaced_cross_entropy_reference`` for at most ``MOST_LOGITS`` classes; the result is float32."""
    return _replaced_operation(None, logits[None], target[None], labels[None])[0][0]
