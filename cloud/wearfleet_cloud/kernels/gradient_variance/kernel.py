"""Triton kernels of the gradient variance: softmax, residuals and both products in one pass over the features."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wearfleet_cloud.kernels.operation import operation

__all__ = ["MOST_CLASSES", "gradient_variance_triton"]

MOST_CLASSES = 128  # residuals of a tile of windows are held by one program


@triton.jit
def _residuals(logits, labels, weight, rows, inside, K, BLOCK_K: tl.constexpr):
    """Residuals and probabilities (M, BLOCK_K) and weights (M,) of the windows ``rows``; absent windows give 0."""
    classes = tl.arange(0, BLOCK_K)[None, :]
    w = tl.load(weight + rows, mask=inside, other=0.0).to(tl.float32)
    live = (inside & (w != 0.0))[:, None] & (classes < K)
    values = tl.load(logits + rows[:, None].to(tl.int64) * K + classes, mask=live, other=-float("inf")).to(
        tl.float32
    )
    top = tl.max(values, 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp(values - top[:, None])
    total = tl.sum(p, 1)
    p = p / tl.where(total == 0.0, 1.0, total)[:, None]
    label = tl.load(labels + rows, mask=inside, other=0)
    return tl.where(live, p - (label[:, None] == classes), 0.0), p, w


@triton.jit
def _inputs(features, rows, inside, columns, F):
    """Features (M, BLOCK_F) with the constant 1 in column F; absent windows give 0."""
    live = inside[:, None] & (columns < F)
    z = tl.load(features + rows[:, None].to(tl.int64) * F + columns, mask=live, other=0.0).to(tl.float32)
    return tl.where(inside[:, None] & (columns == F), 1.0, z)


@triton.jit
def _forward(
    features,  # (G, B, F): G = problems x domains
    logits,  # (G, B, K)
    labels,  # (G, B)
    weight,  # (G, B), sums to 1 over B
    variance,  # (G, K, F + 1) out
    mean,  # (G, K, F + 1) out
    B,
    F,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    squares = tl.zeros((BLOCK_K, BLOCK_F), tl.float32)
    means = tl.zeros((BLOCK_K, BLOCK_F), tl.float32)
    for begin in range(0, B, BLOCK_M):
        window = begin + tl.arange(0, BLOCK_M)
        inside = window < B
        rows = group * B + tl.where(inside, window, 0)
        r, _, w = _residuals(logits, labels, weight, rows, inside, K, BLOCK_K)
        z = _inputs(features, rows, inside & (w != 0.0), columns, F)
        squares = tl.dot(tl.trans(r * r * w[:, None]), z * z, squares, input_precision="ieee")
        means = tl.dot(tl.trans(r * w[:, None]), z, means, input_precision="ieee")
    classes = tl.arange(0, BLOCK_K)[:, None]
    live = (classes < K) & (columns <= F)
    offsets = (group * K + classes).to(tl.int64) * (F + 1) + columns
    tl.store(variance + offsets, squares - means * means, mask=live)
    tl.store(mean + offsets, means, mask=live)


@triton.jit
def _backward(
    features,  # (G, B, F)
    logits,  # (G, B, K)
    labels,  # (G, B)
    weight,  # (G, B)
    mean,  # (G, K, F + 1)
    upstream,  # (G, K, F + 1): gradient of the variances
    grad_features,  # (G, B, F) out
    grad_logits,  # (G, B, K) out
    B,
    F,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = tl.program_id(0)
    window = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = window < B
    rows = group * B + tl.where(inside, window, 0)
    r, p, w = _residuals(logits, labels, weight, rows, inside, K, BLOCK_K)
    r2 = r * r
    own = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    common = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    classes = tl.arange(0, BLOCK_K)[:, None]
    for begin in range(0, F + 1, BLOCK_F):
        columns = begin + tl.arange(0, BLOCK_F)[None, :]
        live = (classes < K) & (columns <= F)
        offsets = (group * K + classes).to(tl.int64) * (F + 1) + columns
        u = tl.load(upstream + offsets, mask=live, other=0.0)
        um = u * tl.load(mean + offsets, mask=live, other=0.0)
        z = _inputs(features, rows, inside & (w != 0.0), columns, F)
        by_z = z * tl.dot(r2, u, input_precision="ieee") - tl.dot(r, um, input_precision="ieee")
        by_z = 2.0 * w[:, None] * by_z
        place = grad_features + rows[:, None].to(tl.int64) * F + columns
        tl.store(place, by_z.to(grad_features.dtype.element_ty), mask=inside[:, None] & (columns < F))
        own = tl.dot(z * z, tl.trans(u), own, input_precision="ieee")
        common = tl.dot(z, tl.trans(um), common, input_precision="ieee")
    by_r = 2.0 * w[:, None] * (r * own - common)
    by_l = p * (by_r - tl.sum(p * by_r, 1)[:, None])
    columns = tl.arange(0, BLOCK_K)[None, :]
    place = grad_logits + rows[:, None].to(tl.int64) * K + columns
    tl.store(place, by_l.to(grad_logits.dtype.element_ty), mask=inside[:, None] & (columns < K))


def _blocks(windows: int, classes: int) -> tuple[int, int, int]:
    """Windows, features and classes of a tile; the products need at least 16 of each."""
    wide = max(16, triton.next_power_of_2(classes))
    columns = 64 if wide <= 16 else 32 if wide <= 32 else 16
    return 16 if windows <= 64 or wide > 16 else 32, columns, wide


def _launch_forward(
    _settings: object, features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    problems, domains, windows, width = features.shape
    classes = logits.shape[-1]
    rows, columns, wide = _blocks(windows, classes)
    variance, mean = (
        features.new_empty((problems, domains, classes, width + 1), dtype=torch.float32) for _ in range(2)
    )
    _forward[problems * domains, triton.cdiv(width + 1, columns)](
        features.contiguous(), logits.contiguous(), labels.contiguous(), weight.contiguous(), variance, mean,
        windows, width, classes, BLOCK_M=rows, BLOCK_F=columns, BLOCK_K=wide, num_warps=8,
    )  # fmt: skip
    return variance, mean


def _launch_backward(
    _settings: object,
    needs: tuple[bool, ...],
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    mean: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, ...]:
    problems, domains, windows, width = features.shape
    classes = logits.shape[-1]
    rows, columns, wide = _blocks(windows, classes)
    found = features.new_empty(features.shape), logits.new_empty(logits.shape)
    _backward[problems * domains, triton.cdiv(windows, rows)](
        features.contiguous(), logits.contiguous(), labels.contiguous(), weight.contiguous(), mean,
        gradient.contiguous(), *found, windows, width, classes,
        BLOCK_M=rows, BLOCK_F=columns, BLOCK_K=wide, num_warps=8,
    )  # fmt: skip
    return tuple(tensor for tensor, needed in zip(found, needs, strict=True) if needed)


_gradient_variance = operation(_launch_forward, _launch_backward, values=1, differentiable=2)


def gradient_variance_triton(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None
) -> Tensor:
    """As ``gradient_variance_reference`` for at most ``MOST_CLASSES`` classes; the result is float32."""
    if weight is None:
        share = torch.full(labels.shape, 1.0 / labels.shape[1], dtype=torch.float32, device=labels.device)
    else:
        share = weight.float() / weight.float().sum(dim=1, keepdim=True).clamp(min=1e-12)
    return _gradient_variance(None, features[None], logits[None], labels[None], share[None])[0][0]
