"""Triton kernels of the soft cross-entropy: logits are read once forward and once backward; targets are never built."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wearfleet_cloud.kernels.operation import operation

__all__ = ["MOST_CLASSES", "soft_cross_entropy_triton"]

MOST_CLASSES = 32_768  # a row of logits must fit into the registers of one program
_TILE = 2048  # logits that a program holds at once, where a row is shorter
_ROWS = 256  # windows that one program of the forward pass sums


@dataclass(frozen=True, slots=True)
class _Form:
    """How the target is given; decided before compilation."""

    smoothing: float
    dense: bool
    pairs: bool


@triton.jit
def _targets(
    labels, other, share, rows, inside, classes, B, K, smoothing, DENSE: tl.constexpr, PAIRS: tl.constexpr
):
    """Rows (M, 1) where ``inside`` (M, 1), classes (1, BLOCK_K) -> smoothed targets, 0 elsewhere."""
    live = inside & (classes < K)
    if DENSE:
        hard = tl.load(labels + rows.to(tl.int64) * K + classes, mask=live, other=0.0).to(tl.float32)
    else:
        hard = (tl.load(labels + rows, mask=inside, other=0) == classes).to(tl.float32)
        if PAIRS:
            part = tl.load(share + rows // B, mask=inside, other=0.0).to(tl.float32)
            second = (tl.load(other + rows, mask=inside, other=0) == classes).to(tl.float32)
            hard = part * hard + (1.0 - part) * second
    return tl.where(live, (1.0 - smoothing) * hard + smoothing / K, 0.0)


@triton.jit
def _forward(
    logits,  # (G, B, K): G = problems x domains
    labels,  # (G, B) or (G, B, K)
    other,  # (G, B)
    share,  # (G,)
    weight,  # (G, B)
    lse,  # (G, B) out
    sums,  # (G, CHUNKS) out: weighted losses
    totals,  # (G, CHUNKS) out: weights
    B,
    K,
    smoothing,
    DENSE: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group, chunk = tl.program_id(0), tl.program_id(1)
    classes = tl.arange(0, BLOCK_K)[None, :]
    loss_sum = tl.zeros((BLOCK_M,), tl.float32)
    weight_sum = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(0, ROWS, BLOCK_M):
        window = chunk * ROWS + begin + tl.arange(0, BLOCK_M)
        inside = window < B
        rows = group * B + tl.where(inside, window, 0)
        live = inside[:, None] & (classes < K)
        offsets = rows[:, None].to(tl.int64) * K + classes
        values = tl.load(logits + offsets, mask=live, other=-float("inf")).to(tl.float32)
        w = tl.load(weight + rows, mask=inside, other=0.0).to(tl.float32)
        values = tl.where((w == 0.0)[:, None], 0.0, values)  # padding may hold anything
        top = tl.max(values, 1)
        log_sum = top + tl.log(tl.sum(tl.exp(values - top[:, None]), 1))
        targets = _targets(
            labels, other, share, rows[:, None], inside[:, None], classes, B, K, smoothing, DENSE, PAIRS
        )
        gap = tl.where(live, log_sum[:, None] - values, 0.0)
        losses = tl.sum(targets * gap, 1)
        loss_sum += w * losses
        weight_sum += w
        tl.store(lse + rows, log_sum, mask=inside)
    place = group * tl.num_programs(1) + chunk
    tl.store(sums + place, tl.sum(loss_sum, 0))
    tl.store(totals + place, tl.sum(weight_sum, 0))


@triton.jit
def _backward(
    logits,  # (G, B, K)
    labels,
    other,
    share,
    weight,  # (G, B)
    lse,  # (G, B)
    scale,  # (G,): gradient of the risk over the domain's total weight
    grad_logits,  # (G, B, K) out
    grad_targets,  # (G, B, K) out, with dense targets that need it
    N,  # G x B
    B,
    K,
    smoothing,
    DENSE: tl.constexpr,
    PAIRS: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < N
    rows = tl.where(inside, rows, 0)
    classes = tl.arange(0, BLOCK_K)[None, :]
    live = inside[:, None] & (classes < K)
    offsets = rows[:, None].to(tl.int64) * K + classes
    factor = tl.load(scale + rows // B, mask=inside, other=0.0)
    factor = factor * tl.load(weight + rows, mask=inside, other=0.0).to(tl.float32)
    present = live & (factor != 0.0)[:, None]
    gap = tl.load(logits + offsets, mask=present, other=0.0).to(tl.float32)
    gap = tl.where(present, gap - tl.load(lse + rows, mask=inside, other=0.0)[:, None], 0.0)
    targets = _targets(
        labels, other, share, rows[:, None], inside[:, None], classes, B, K, smoothing, DENSE, PAIRS
    )
    slope = tl.exp(gap) * tl.sum(targets, 1)[:, None] - targets
    out = tl.where(present, factor[:, None] * slope, 0.0)
    tl.store(grad_logits + offsets, out.to(grad_logits.dtype.element_ty), mask=live)
    if TARGETS:
        out = -factor[:, None] * (1.0 - smoothing) * gap
        tl.store(grad_targets + offsets, out.to(grad_targets.dtype.element_ty), mask=live)


def _blocks(rows: int, classes: int) -> tuple[int, int, int]:
    """Rows and classes of a tile, and warps: short rows share a program, long ones get more warps."""
    width = triton.next_power_of_2(classes)
    height = max(1, min(triton.next_power_of_2(rows), _TILE // width))
    return height, width, 4 if height * width <= 4096 else 8 if width <= 16_384 else 16


def _launch_forward(
    form: _Form, logits: Tensor, labels: Tensor, other: Tensor, share: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    problems, domains, windows, classes = logits.shape
    groups, chunks = problems * domains, triton.cdiv(windows, _ROWS)
    rows = min(_ROWS, triton.next_power_of_2(windows))
    height, width, warps = _blocks(rows, classes)
    lse = logits.new_empty((problems, domains, windows), dtype=torch.float32)
    sums, totals = (lse.new_empty((problems, domains, chunks)) for _ in range(2))
    _forward[groups, chunks](
        logits.contiguous(), labels.contiguous(), other.contiguous(), share.contiguous(), weight.contiguous(),
        lse, sums, totals, windows, classes, form.smoothing,
        DENSE=form.dense, PAIRS=form.pairs, ROWS=rows, BLOCK_M=height, BLOCK_K=width, num_warps=warps,
    )  # fmt: skip
    if chunks > 1:
        sums, totals = sums.sum(-1, keepdim=True), totals.sum(-1, keepdim=True)
    total = totals[..., 0].clamp(min=1e-12)
    return sums[..., 0] / total, lse, total


def _launch_backward(
    form: _Form,
    needs: tuple[bool, ...],
    logits: Tensor,
    labels: Tensor,
    other: Tensor,
    share: Tensor,
    weight: Tensor,
    lse: Tensor,
    total: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, ...]:
    problems, domains, windows, classes = logits.shape
    rows = problems * domains * windows
    height, width, warps = _blocks(rows, classes)
    by_logits = logits.new_empty(logits.shape)
    wanted = form.dense and needs[1]
    by_targets = labels.new_empty(labels.shape) if wanted else by_logits
    _backward[triton.cdiv(rows, height),](
        logits.contiguous(), labels.contiguous(), other.contiguous(), share.contiguous(), weight.contiguous(),
        lse, (gradient / total).contiguous(), by_logits, by_targets, rows, windows, classes, form.smoothing,
        DENSE=form.dense, PAIRS=form.pairs, TARGETS=wanted, BLOCK_M=height, BLOCK_K=width, num_warps=warps,
    )  # fmt: skip
    found = (by_logits, by_targets)
    return tuple(tensor for tensor, needed in zip(found, needs, strict=True) if needed)


_soft_cross_entropy = operation(_launch_forward, _launch_backward, values=1, differentiable=2)


def soft_cross_entropy_triton(
    logits: Tensor,
    labels: Tensor,
    other: Tensor | None = None,
    share: Tensor | None = None,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """As ``soft_cross_entropy_reference`` for at most ``MOST_CLASSES`` classes; the result is float32."""
    domains, windows, _ = logits.shape
    dense, pairs = labels.is_floating_point(), other is not None
    if weight is None:
        weight = logits.new_ones((domains, windows))
    if other is None or share is None:
        other, share = labels.new_zeros((1, 1)), weight.new_ones((1,))
    form = _Form(smoothing, dense, pairs)
    tensors = (tensor[None] for tensor in (logits, labels, other, share, weight))
    return _soft_cross_entropy(form, *tensors)[0][0]
