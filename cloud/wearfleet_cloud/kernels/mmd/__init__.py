"""Maximum mean discrepancy between all pairs of domains with a sum of Gaussian kernels; the maths is in README.md."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from wearfleet_protos.errors import ShapeError

from wearfleet_cloud.kernels.dispatch import takes_triton
from wearfleet_cloud.kernels.mmd.direct import mmd_direct
from wearfleet_cloud.kernels.mmd.reference import mmd_reference

__all__ = ["FIXED_GAMMAS", "constants", "median_gammas", "mmd", "mmd_direct", "mmd_reference"]

FIXED_GAMMAS: Final = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
"""Of the published code: on features of hundreds of dimensions only the first two still have a slope."""
_FACTORS: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
_SAMPLE: Final = 512  # windows whose distances make the median


def mmd(features: Tensor, gammas: Tensor, weight: Tensor | None = None) -> Tensor:
    """Biased squared MMD, mean over all pairs of domains.

    Works under ``torch.func.grad`` and ``vmap``. On a GPU nothing of the size of the kernel matrix is
    written: memory is that of the features.

    Args:
        features: (D, B, F).
        gammas: (G,) float, at least one; no gradient goes through them.
        weight: (D, B) of every window, 0 for padding, None for ones; has no gradient.

    Returns:
        (), float32 or wider, from 0 to 2 G; 0 for one domain.

    Raises:
        ShapeError: shapes that do not fit each other.
    """
    if features.dim() != 3 or 0 in features.shape:
        raise ShapeError(
            f"features must be (domains, windows, F), at least one each, got {tuple(features.shape)}"
        )
    if gammas.dim() != 1 or len(gammas) == 0:
        raise ShapeError(f"gammas must be (G,), at least one, got {tuple(gammas.shape)}")
    if weight is not None and weight.shape != features.shape[:2]:
        raise ShapeError(f"weight must be {tuple(features.shape[:2])}, got {tuple(weight.shape)}")
    if features.shape[0] == 1:
        return features.new_zeros((), dtype=torch.promote_types(features.dtype, torch.float32))
    gammas = gammas.detach()
    if takes_triton(features, gammas, *([] if weight is None else [weight])):
        from wearfleet_cloud.kernels.mmd import kernel  # noqa: PLC0415  only where Triton is

        return kernel.mmd_triton(features, gammas, weight)
    return mmd_direct(features, gammas, weight)


def median_gammas(features: Tensor, weight: Tensor | None = None) -> Tensor:
    """Bandwidths that fit the features: 1/4 to 4 over the median squared distance, a constant of the step.

    The median is over the pairs of at most 512 windows, evenly spaced. Differs from the published code, which uses
    ``FIXED_GAMMAS``.

    Args:
        features: (D, B, F).
        weight: (D, B) of every window, 0 for padding, None for ones.

    Returns:
        (5,) in the features' dtype, on their device.

    Source: Gretton et al. 2012, JMLR 13, section 8 (median heuristic).
    """
    flat = features.detach().flatten(0, 1)
    step = -(-flat.shape[0] // _SAMPLE)
    sample = flat[::step].float()
    squares = torch.cdist(sample, sample).square()
    apart = ~torch.eye(len(sample), dtype=torch.bool, device=flat.device)
    if weight is not None:
        present = weight.flatten()[::step] > 0.0
        apart = apart & present & present[:, None]
    scale = (
        torch.where(apart, squares, squares.new_full((), torch.nan))
        .nanmedian()
        .clamp(min=1e-12)
        .nan_to_num(1.0)
    )
    return (constants(_FACTORS, scale) / scale).to(features.dtype)


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers (N,) as a tensor of the dtype and device of another, without a copy that the device waits for."""
    return torch.stack([like.new_full((), value) for value in values])
