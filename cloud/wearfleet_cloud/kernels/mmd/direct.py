"""The same with every block of the kernel matrix computed once, for the processor."""

import torch
from torch import Tensor

from wearfleet_cloud.kernels.mmd.reference import shares_of

__all__ = ["mmd_direct", "pair_signs"]


def mmd_direct(features: Tensor, gammas: Tensor, weight: Tensor | None = None) -> Tensor:
    """Equal to ``mmd_reference``: D^2 blocks of kernels from one product of matrices instead of 3 D (D - 1) / 2.

    Distances are taken from features around their common mean, so that the product's rounding does not grow with it;
    that of a window to itself is 0, not what rounding leaves of it.
    """
    domains, windows, _ = features.shape
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    flat = features.flatten(0, 1)
    flat = flat - flat.detach().mean(dim=0)
    norms = flat.square().sum(dim=1)
    itself = torch.eye(domains * windows, dtype=torch.bool, device=flat.device)
    squares = (norms[:, None] + norms[None] - 2.0 * flat @ flat.T).masked_fill(itself, 0.0).clamp(min=1e-30)
    gammas = gammas.to(features.dtype)
    values = torch.exp(-gammas[0] * squares)
    for gamma in gammas[1:]:
        values = values + torch.exp(-gamma * squares)
    blocks = values.reshape(domains, windows, domains, windows)
    shares = shares_of(features, weight)
    means = torch.einsum("aibj,ai,bj->ab", blocks, shares, shares)
    return (means * pair_signs(means)).sum()


def pair_signs(blocks: Tensor) -> Tensor:
    """(D, D) what a block's mean counts: 2 / D on the diagonal, -2 / (D (D - 1)) elsewhere."""
    domains = blocks.shape[0]
    same = torch.eye(domains, dtype=blocks.dtype, device=blocks.device)
    return 2.0 / domains * same - 2.0 / (domains * (domains - 1)) * (1.0 - same)
