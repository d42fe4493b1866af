"""The CORAL penalty from covariances, each computed once, and their distances to the mean covariance."""

from torch import Tensor

from wearfleet_cloud.kernels.coral.reference import centred

__all__ = ["coral_penalty_spread"]


def coral_penalty_spread(features: Tensor, weight: Tensor | None = None) -> Tensor:
    """Equal to ``coral_penalty_reference``: sum_{a<b} |C_a - C_b|^2 = D sum_a |C_a - mean C|^2, so no pair is formed.

    Args:
        features: (D, B, F), D >= 2, B >= 2.
        weight: (D, B) or None for ones.

    Returns:
        ().

    Source: README.md beside this file.
    """
    domains = features.shape[0]
    means, rows, degrees = centred(features, weight)
    covariances = rows.transpose(1, 2) @ rows / degrees[:, None, None]
    terms = [
        (t - t.mean(dim=0)).square().mean(dim=tuple(range(1, t.dim()))).sum() for t in (means, covariances)
    ]
    return 2.0 / (domains - 1) * (terms[0] + terms[1])
