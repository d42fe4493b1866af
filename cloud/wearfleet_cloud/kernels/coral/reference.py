"""The CORAL penalty by its definition, with explicit covariance matrices."""

from itertools import combinations

import torch
from torch import Tensor

__all__ = ["centred", "coral_penalty_reference"]


def coral_penalty_reference(features: Tensor, weight: Tensor | None = None) -> Tensor:
    """2 / (D (D - 1)) sum_{a<b} [ mean_f (mu_a - mu_b)^2 + mean_{f,f'} (C_a - C_b)^2 ].

    mu_a is the mean and C_a the unbiased covariance (F, F) of the features of domain a.

    Args:
        features: (D, B, F), D >= 2, B >= 2.
        weight: (D, B) or None for ones.

    Returns:
        ().

    Source: specs/ood.md 2.5; Sun and Saenko 2016, arXiv:1607.01719, equation 1.
    """
    means, rows, degrees = centred(features, weight)
    covariances = rows.transpose(1, 2) @ rows / degrees[:, None, None]
    terms = [
        (means[a] - means[b]).square().mean() + (covariances[a] - covariances[b]).square().mean()
        for a, b in combinations(range(features.shape[0]), 2)
    ]
    return torch.stack(terms).mean()


def centred(features: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Means, centred rows and degrees of freedom of every domain.

    Args:
        features: (D, B, F).
        weight: (D, B) or None.

    Returns:
        means (D, F); rows (D, B, F) times the root of their weight, so that rows^T rows is the scatter
        matrix; degrees (D,) = total weight - 1.
    """
    if weight is None:
        means = features.mean(dim=1)
        return (
            means,
            features - means[:, None],
            features.new_full(features.shape[:1], features.shape[1] - 1.0),
        )
    total = weight.sum(dim=1)
    means = (features * weight[:, :, None]).sum(dim=1) / total[:, None]
    rows = (features - means[:, None]) * weight.sqrt()[:, :, None]
    return means, rows, total - 1.0
