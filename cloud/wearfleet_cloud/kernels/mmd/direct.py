"""The same with every block of the kernel matrix computed once, for the processor."""

import torch
from torch import Tensor

from wearfleet_cloud.kernels.mmd.reference import shares_of
from wearfleet_cloud.kernels.operation import operation

__all__ = ["mmd_direct", "pair_signs"]


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
    norms = flat.square().sum(dim=2)
    squares = norms[:, :, None] + norms[:, None, :] - 2.0 * flat @ flat.mT
    itself = torch.eye(flat.shape[1], dtype=torch.bool, device=flat.device)
    squares = squares.masked_fill(itself, 0.0).clamp(min=1e-30)
    values, slopes = torch.zeros_like(squares), torch.zeros_like(squares)
    for gamma in gammas.unbind(1):
        kernel = torch.exp(-gamma[:, None, None] * squares)
        values = values + kernel
        slopes = slopes + gamma[:, None, None] * kernel
    # A window does not pull itself; what rounding would leave of that is large where the kernel is narrow.
    return (values * counts).sum(dim=(1, 2)), (slopes * counts).masked_fill(itself, 0.0)


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
