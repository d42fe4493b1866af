"""Triton kernels of the distillation loss: both rows of logits are read once forward and once backward."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wearfleet_cloud.kernels.distillation.reference import DIVERGENCES, Divergence
from wearfleet_cloud.kernels.operation import operation

__all__ = ["MOST_CLASSES", "distillation_triton"]

MOST_CLASSES = 32_768  # two rows of logits must fit into the registers of one program
_TILE = 1024
_FORWARD: tl.constexpr = tl.constexpr(0)
_REVERSE: tl.constexpr = tl.constexpr(1)


@dataclass(frozen=True, slots=True)
class _Form:
    divergence: Divergence
    temperature: float
    alpha: float
    beta: float
    labelled: bool


@triton.jit
def _log_softmax(values, live):
    """Rows (M, BLOCK_K) -> logarithms of probabilities, 0 outside ``live``."""
    values = tl.where(live, values, -float("inf"))
    top = tl.max(values, 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    shifted = values - top[:, None]
    total = tl.sum(tl.exp(shifted), 1)
    total = tl.where(total == 0.0, 1.0, total)  # rows outside the problem
    return tl.where(live, shifted - tl.log(total)[:, None], 0.0)


@triton.jit
def _load(student, teacher, labels, weight, offsets, rows, inside, live):
    """Logits as float32, class and weight of the rows; a row of weight 0 reads nothing else."""
    w = tl.load(weight + rows, mask=inside, other=0.0).to(tl.float32)
    present = live & (w != 0.0)[:, None]
    s = tl.load(student + offsets, mask=present, other=0.0).to(tl.float32)
    t = tl.load(teacher + offsets, mask=present, other=0.0).to(tl.float32)
    return s, t, tl.load(labels + rows, mask=inside, other=0), w


@triton.jit
def _mixture(a, b, live, beta):
    """Logarithm of beta e^a + (1 - beta) e^b, 0 outside ``live``; the larger term is taken out."""
    top = tl.maximum(a, b)
    inner = beta * tl.exp(a - top) + (1.0 - beta) * tl.exp(b - top)
    return tl.where(live, top + tl.log(tl.where(live, inner, 1.0)), 0.0)


@triton.jit
def _forward(
    student,  # (G, N, K)
    teacher,  # (G, N, K)
    labels,  # (G, N)
    weight,  # (G, N)
    sums,  # (G, CHUNKS) out: weighted losses
    totals,  # (G, CHUNKS) out: weights
    N,
    K,
    cold,  # 1 / temperature
    hard,  # factor of the cross-entropy
    soft,  # factor of the divergence
    beta,
    LABELLED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group, chunk = tl.program_id(0), tl.program_id(1)
    window = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = window < N
    rows = group * N + tl.where(inside, window, 0)
    classes = tl.arange(0, BLOCK_K)[None, :]
    live = inside[:, None] & (classes < K)
    offsets = rows[:, None].to(tl.int64) * K + classes
    s, t, y, w = _load(student, teacher, labels, weight, offsets, rows, inside, live)
    a, b = _log_softmax(t * cold, live), _log_softmax(s * cold, live)
    p, q = tl.where(live, tl.exp(a), 0.0), tl.where(live, tl.exp(b), 0.0)
    if KIND == _FORWARD:
        losses = soft * tl.sum(p * (a - b), 1)
    elif KIND == _REVERSE:
        losses = soft * tl.sum(q * (b - a), 1)
    else:
        m = _mixture(a, b, live, beta)
        losses = soft * tl.sum(beta * p * (a - m) + (1.0 - beta) * q * (b - m), 1)
    if LABELLED:
        scores = _log_softmax(s, live)
        losses -= hard * tl.sum(tl.where(y[:, None] == classes, scores, 0.0), 1)
    place = group * tl.num_programs(1) + chunk
    tl.store(sums + place, tl.sum(w * losses, 0))
    tl.store(totals + place, tl.sum(w, 0))


@triton.jit
def _backward(
    student,  # (G, N, K)
    teacher,  # (G, N, K)
    labels,  # (G, N)
    weight,  # (G, N)
    scale,  # (G,): gradient of the loss over the total weight
    grad_student,  # (G, N, K) out
    grad_teacher,  # (G, N, K) out
    ROWS,  # G x N
    N,
    K,
    cold,
    hard,
    soft,
    beta,
    LABELLED: tl.constexpr,
    KIND: tl.constexpr,
    BY_STUDENT: tl.constexpr,
    BY_TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < ROWS
    rows = tl.where(inside, rows, 0)
    classes = tl.arange(0, BLOCK_K)[None, :]
    live = inside[:, None] & (classes < K)
    offsets = rows[:, None].to(tl.int64) * K + classes
    s, t, y, w = _load(student, teacher, labels, weight, offsets, rows, inside, live)
    factor = (w * tl.load(scale + rows // N, mask=inside, other=0.0))[:, None]
    a, b = _log_softmax(t * cold, live), _log_softmax(s * cold, live)
    p, q = tl.where(live, tl.exp(a), 0.0), tl.where(live, tl.exp(b), 0.0)
    if KIND == _FORWARD:
        by_s = q - p
        by_t = p * ((a - b) - tl.sum(p * (a - b), 1)[:, None])
    elif KIND == _REVERSE:
        by_s = q * ((b - a) - tl.sum(q * (b - a), 1)[:, None])
        by_t = p - q
    else:
        m = _mixture(a, b, live, beta)
        u, v = beta * (a - m), (1.0 - beta) * (b - m)
        by_s = q * (v - tl.sum(q * v, 1)[:, None])
        by_t = p * (u - tl.sum(p * u, 1)[:, None])
    if BY_STUDENT:
        out = soft * cold * by_s
        if LABELLED:
            out += hard * (tl.where(live, tl.exp(_log_softmax(s, live)), 0.0) - (y[:, None] == classes))
        tl.store(grad_student + offsets, (factor * out).to(grad_student.dtype.element_ty), mask=live)
    if BY_TEACHER:
        out = factor * soft * cold * by_t
        tl.store(grad_teacher + offsets, out.to(grad_teacher.dtype.element_ty), mask=live)


def _numbers(form: _Form) -> tuple[float, float, float, float]:
    """1 / tau, factors of cross-entropy and divergence, beta."""
    return 1.0 / form.temperature, 1.0 - form.alpha, form.alpha * form.temperature**2, form.beta


def _blocks(rows: int, classes: int) -> tuple[int, int, int]:
    width = triton.next_power_of_2(classes)
    height = max(1, min(triton.next_power_of_2(rows), _TILE // width))
    return height, width, 4 if height * width <= 2048 else 8 if width <= 8192 else 16


def _launch_forward(
    form: _Form, student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    problems, windows, classes = student.shape
    height, width, warps = _blocks(windows, classes)
    chunks = triton.cdiv(windows, height)
    sums, totals = (student.new_empty((problems, chunks), dtype=torch.float32) for _ in range(2))
    _forward[problems, chunks](
        student.contiguous(), teacher.contiguous(), labels.contiguous(), weight.contiguous(), sums, totals,
        windows, classes, *_numbers(form), LABELLED=form.labelled, KIND=DIVERGENCES.index(form.divergence),
        BLOCK_M=height, BLOCK_K=width, num_warps=warps,
    )  # fmt: skip
    total = totals.sum(-1).clamp(min=1e-12)
    return sums.sum(-1) / total, total


def _launch_backward(
    form: _Form,
    needs: tuple[bool, ...],
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weight: Tensor,
    total: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, ...]:
    problems, windows, classes = student.shape
    height, width, warps = _blocks(problems * windows, classes)
    found = [
        t.new_empty(t.shape) if needed else t for t, needed in zip((student, teacher), needs, strict=True)
    ]
    _backward[triton.cdiv(problems * windows, height),](
        student.contiguous(), teacher.contiguous(), labels.contiguous(), weight.contiguous(),
        (gradient / total).contiguous(), *found, problems * windows, windows, classes, *_numbers(form),
        LABELLED=form.labelled, KIND=DIVERGENCES.index(form.divergence),
        BY_STUDENT=needs[0], BY_TEACHER=needs[1], BLOCK_M=height, BLOCK_K=width, num_warps=warps,
    )  # fmt: skip
    return tuple(tensor for tensor, needed in zip(found, needs, strict=True) if needed)


_distillation = operation(_launch_forward, _launch_backward, values=1, differentiable=2)


def distillation_triton(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    divergence: Divergence,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """As ``distillation_reference`` for at most ``MOST_CLASSES`` classes; the result is float32."""
    windows = student.shape[0]
    form = _Form(divergence, temperature, alpha, beta, labels is not None)
    if labels is None:
        labels = torch.zeros((windows,), dtype=torch.int64, device=student.device)
    if weight is None:
        weight = student.new_ones((windows,))
    return _distillation(form, student[None], teacher[None], labels[None], weight[None])[0][0]
