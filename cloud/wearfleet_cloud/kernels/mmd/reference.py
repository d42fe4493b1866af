"""Maximum mean discrepancy between all pairs of domains, by its definition."""

from itertools import combinations

import torch
from torch import Tensor

__all__ = ["mmd_reference", "shares_of"]


def mmd_reference(features: Tensor, gammas: Tensor, weight: Tensor | None = None) -> Tensor:
    """2 / (D (D - 1)) sum_{a<b} [ E k(z_a, z_a') + E k(z_b, z_b') - 2 E k(z_a, z_b) ].

    k(u, v) = sum_g exp(-gamma_g max(|u - v|^2, 1e-30)); expectations over all pairs of windows, a window with itself
    included (the biased estimate, which is never negative).

    Args:
        features: (D, B, F), D >= 2.
        gammas: (G,).
        weight: (D, B) or None for ones.

    Returns:
        ().

    Source: Gretton et al. 2012, JMLR 13, equation 5; Li et al. 2018 (MMD-AAE) for all pairs; specs/ood.md 2.6.
    """
    shares = shares_of(features, weight)

    def kernel(a: int, b: int) -> Tensor:
        squares = (features[a][:, None] - features[b][None]).square().sum(dim=-1).clamp(min=1e-30)
        values = torch.exp(-gammas[:, None, None] * squares).sum(dim=0)
        return shares[a] @ values @ shares[b]

    domains = range(features.shape[0])
    terms = [kernel(a, a) + kernel(b, b) - 2.0 * kernel(a, b) for a, b in combinations(domains, 2)]
    return torch.stack(terms).mean()


def shares_of(features: Tensor, weight: Tensor | None) -> Tensor:
    """(D, B) weights that sum to 1 in every domain (to 0 in one without weight)."""
    if weight is None:
        return features.new_full(features.shape[:2], 1.0 / features.shape[1])
    return (weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-12)).to(features.dtype)
