"""The same with every block of the kernel matrix computed once, for the processor."""

from typing import Final

import torch
from torch import Tensor

from wearfleet_cloud.kernels.mmd.reference import shares_of
from wearfleet_cloud.kernels.operation import operation

__all__ = ["mmd_direct", "pair_signs"]

_NOTHING: Final = -87.0
"""Its exponential is 1.6e-38, the last normal number; denormal ones take a processor several times as long, and between
wide features nearly every value of the narrow kernels is one. Nothing is lost: a value is off by 1.6e-38 at most."""


def mmd_direct(features: Tensor, gammas: Tensor, weight: Tensor | None = None) -> Tensor:
    """Equal to ``mmd_reference``: D^2 blocks of kernels from one product of matrices instead of 3 D (D - 1) / 2.

    Distances are taken from features around their common mean, so that the product's rounding does not grow with it;
    that of a window to itself is 0, not what rounding leaves of it. The gradient is another product of matrices:
    with L = sum_ij c_ij sum_g exp(-g D_ij) and W_ij = c_ij sum_g g exp(-g D_ij) it is 4 sum_j W_ij (z_j - z_i).
    """
    domains, windows, _ = features.shape
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    flat = features.flatten(0, 1)
    flat = flat - flat.detach().mean(dim=0)
    share = shares_of(features, weight)
    signs = pair_signs(flat.new_empty(domains, domains))
    counts = signs[:, None, :, None] * share[:, :, None, None] * share
    counts = counts.reshape(domains * windows, domains * windows)
    (value,) = _kernel_sum(None, flat[None], gammas.to(features.dtype)[None], counts[None])
    return value[0]


def pair_signs(blocks: Tensor) -> Tensor:
    """(D, D) what a block's mean counts: 2 / D on the diagonal, -2 / (D (D - 1)) elsewhere."""
    domains = blocks.shape[0]
    same = torch.eye(domains, dtype=blocks.dtype, device=blocks.device)
    return 2.0 / domains * same - 2.0 / (domains * (domains - 1)) * (1.0 - same)


def _forward(_settings: object, flat: Tensor, gammas: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """Values (P,) and W (P, N, N) of rows (P, N, F), bandwidths (P, G) and weights of the pairs (P, N, N)."""
    problems, count, _ = flat.shape
    norms = torch.linalg.vecdot(flat, flat)
    squares = torch.baddbmm(norms[:, :, None] + norms[:, None, :], flat, flat.mT, alpha=-2.0)
    itself = torch.eye(count, dtype=torch.bool, device=flat.device)
    squares = squares.masked_fill_(itself, 0.0).clamp_(min=1e-30).reshape(problems, 1, count * count)
    kernels = torch.mul(gammas[:, :, None], squares).neg_().clamp_(min=_NOTHING).exp_()
    sums = torch.stack([torch.ones_like(gammas), gammas], dim=1) @ kernels  # of kernels; of gamma times them
    values, slopes = sums.reshape(problems, 2, count, count).unbind(1)
    # A window does not pull itself; what rounding would leave of that is large where the kernel is narrow.
    pull = (slopes * counts).masked_fill_(itself, 0.0)
    return torch.linalg.vecdot(values.flatten(1), counts.flatten(1)), pull


def _backward(
    _settings: object,
    _needs: tuple[bool, ...],
    flat: Tensor,
    _gammas: Tensor,
    _counts: Tensor,
    pull: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, ...]:
    pull = 4.0 * gradient[:, None, None] * pull
    return (pull @ flat - pull.sum(dim=2)[:, :, None] * flat,)


_kernel_sum = operation(_forward, _backward, values=1, differentiable=1)
