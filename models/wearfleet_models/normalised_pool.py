"""Batch normalisation, maximum of neighbours and ReLU as one operation, for the processor.

The three are bound by memory there. Normalisation keeps the order of numbers where its factor is positive, so the
larger of two neighbours is found first and only half as many numbers are normalised; the gradient is written once.
The reference is the three layers themselves, and they are what runs on a GPU, under ``torch.func``, in a trace, with
window weights, and in other memory orders.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wearfleet_models.layers import BatchNorm, MaxPool
from wearfleet_models.plain import runs_plainly

__all__ = ["normalise_pool_relu"]


def normalise_pool_relu(norm: BatchNorm, pool: MaxPool, x: Tensor, weight: Tensor | None) -> Tensor:
    """``relu(pool(norm(x, weight)))``.

    Args:
        norm: its running statistics see the batch.
        pool: of any size; of 2 the fast way is open.
        x: (B, C, T).
        weight: (B,) of each window or None.

    Returns:
        (B, C, T // size). On the fast way it is differentiable once.
    """
    fast = norm.training and weight is None and pool.size == 2 and x.shape[2] > 1
    if not (fast and x.device.type == "cpu" and x.stride(1) == 1 and runs_plainly()):
        return torch.relu(pool(norm(x, weight)))
    result: Tensor
    result, mean, variance = _NormalisePoolRelu.apply(x, norm.weight, norm.bias, norm.domains, norm.eps)  # type: ignore[no-untyped-call]
    norm.see(mean, variance, x.shape[0] // norm.domains * x.shape[2])
    return result


class _NormalisePoolRelu(torch.autograd.Function):
    """With D domains of n numbers a channel each, y (D n, C) their numbers, m the larger of two neighbours.

    Forward: z = relu(m s + (beta - mu s)), s = gamma / sqrt(var + eps); mean mu and variance by domain.
    Backward: g = dz where z > 0; S = sum g and X = sum g (m - mu) / sqrt(var + eps) by domain; then
    dbeta = sum S, dgamma = sum X, dy = s g at the larger neighbours - s (S + (y - mu) X / sqrt(var + eps)) / n.

    Where gamma is negative the smaller neighbour counts: both are taken with the sign of gamma.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - torch passes them in this order
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, domains: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = x.transpose(1, 2)  # (B, T, C), in memory as it stands
        parts = y.reshape(domains, -1, y.shape[2])
        found = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts.unbind(0)]
        mean, variance = (torch.stack(statistic) for statistic in zip(*found, strict=True))
        inverse = torch.rsqrt(variance + eps)
        first, second = _neighbours(y)
        sign = None
        if bool((gamma < 0).any()):
            sign = torch.where(gamma < 0, -1.0, 1.0)
            first, second = first * sign, second * sign
        largest = torch.maximum(first, second)
        largest = largest if sign is None else largest.mul_(sign)
        scale = gamma * inverse
        flat = largest.reshape(domains, -1, y.shape[2])
        z = torch.addcmul((beta - mean * scale)[:, None], flat, scale[:, None]).relu_()
        ctx.save_for_backward(y, flat, z, mean, inverse, gamma, sign)
        ctx.mark_non_differentiable(mean, variance)
        return z.reshape(largest.shape).transpose(1, 2), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _mean: Tensor, _variance: Tensor) -> tuple[Tensor | None, ...]:
        y, flat, z, mean, inverse, gamma, sign = ctx.saved_tensors
        count = y.shape[0] // len(mean) * y.shape[1]
        g = torch.ops.aten.threshold_backward(slope.transpose(1, 2).reshape(z.shape), z, 0)
        total = g.sum(dim=1)
        pull = ((g * flat).sum(dim=1) - mean * total) * inverse
        scale = gamma * inverse
        tilt = -scale * inverse * pull / count
        rest = -scale * total / count - tilt * mean
        dy = torch.addcmul(rest[:, None], y.reshape(len(mean), -1, y.shape[2]), tilt[:, None]).reshape(
            y.shape
        )
        first, second = _neighbours(y)
        ahead = second - first if sign is None else (second - first) * sign
        g = g.mul_(scale[:, None]).reshape(ahead.shape)
        to_second = torch.ops.aten.threshold_backward(g, ahead, 0)  # on a tie the first gets it
        to_first = g.sub_(to_second)
        for own, given in zip(_neighbours(dy), (to_first, to_second), strict=True):
            own.add_(given)
        return dy.transpose(1, 2), pull.sum(dim=0), total.sum(dim=0), None, None


def _neighbours(y: Tensor) -> tuple[Tensor, Tensor]:
    """Every first and every second of two neighbouring samples of (B, T, C): (B, T // 2, C) each, views."""
    batch, length, channels = y.shape
    first, second = y[:, : length // 2 * 2].reshape(batch, length // 2, 2, channels).unbind(2)
    return first, second
