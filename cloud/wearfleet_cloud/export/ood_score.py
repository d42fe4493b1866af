"""How far a window lies from everything the model was trained on, as a small module of the exported graph.

Four scores, larger = further away:

* ``max-probability``: ``-max(softmax(logits))``, in [-1, -1/K].
* ``energy``: ``-logsumexp(logits)``. Finds windows on which the classifier errs.
* ``mahalanobis``: squared distance of the embedding to the nearest class mean under one tied covariance. Finds
  windows that look like no training window. The default.
* ``cosine``: ``-max_c cos(embedding, class mean c)``, in [-1, 1].

Measured by ``tests/benchmarks/bench_ood.py`` (mean AUROC on HAPT and USC-HAD, CNN, 1000 steps):

    unseen activity   mahalanobis 0.74 and 0.76 (full rank 0.70 and 0.70), energy 0.50 and 0.45
    turned sensor     mahalanobis 0.72 and 0.71 (full rank 0.71 and 0.70), energy 0.23 and 0.03
    own errors        mahalanobis 0.35 and 0.48 (full rank 0.37 and 0.52), energy 0.85 and 0.80

The full F x F whitening would cost more than the network itself (F = 832: 692 k multiplications against 350 k), so
the covariance ``S = U diag(l) U'`` keeps its ``r`` largest eigenvalues and replaces the others by their mean ``s``:
``S_r = U_r diag(l_r) U_r' + s (I - U_r U_r')``. That is the only approximation (the maximum-likelihood covariance of
probabilistic PCA), and with ``r = F`` there is none. Everything after it is exact. Let ``m`` be the overall mean,
``d = z - m``, and let ``V = [U_r, V']`` be orthonormal columns that also span all class means. ``S_r^-1`` is diagonal
in ``V`` (entries ``a``: ``1 / l_j``, then ``1 / s``) and ``1 / s`` times the identity outside it, so with ``p = V' d``
and the class means ``p_c`` in the same coordinates

    D_c = sum_j a_j (p_j - p_cj)^2 + |d - V p|^2 / s

which is two thin matrix products (F x R and back, R <= r + K - 1) and sums. ``|d - V p|^2 = |d|^2 - |p|^2`` would save
one of them and lose what is small beside the distance of the classes: with features of which all but a few directions
are nearly constant (an average over time, a ResNet's) float32 was then off by 0.4 % of the largest score.

Source: maximum probability: Hendrycks and Gimpel 2017, arXiv:1610.02136, section 2; energy: Liu et al. 2020,
arXiv:2010.03759, equation 4 with T = 1; distance: Lee et al. 2018, arXiv:1807.03888, equation 2; covariance: Tipping
and Bishop 1999, "Probabilistic principal component analysis", equations 7 and 8; cosine: specs/ood.md 3.4.1.
Differs: sign (ours grows with distance); low rank as above; 1e-6 on the diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn
from wearfleet_protos.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "DEFAULT_METHOD",
    "DEFAULT_RANK",
    "OOD_METHODS",
    "Centroids",
    "CosineScore",
    "EnergyScore",
    "MahalanobisScore",
    "MaxProbabilityScore",
    "OodMethod",
    "OodScore",
    "TiedGaussian",
    "fit_centroids",
    "fit_tied_gaussian",
    "threshold_of",
]

OodMethod: TypeAlias = Literal["max-probability", "energy", "mahalanobis", "cosine"]
OOD_METHODS: Final[tuple[OodMethod, ...]] = ("max-probability", "energy", "mahalanobis", "cosine")
DEFAULT_METHOD: Final[OodMethod] = "mahalanobis"
DEFAULT_RANK: Final = 16

_RIDGE: Final = 1e-6
_SPAN_TOLERANCE: Final = 1e-8
_QUANTILE: Final = 0.95
_SHORTEST: Final = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class TiedGaussian:
    """The distance of the module docstring, ready to evaluate. All float32.

    Args:
        mean: (F,) overall mean ``m``.
        basis: (F, R) ``V``.
        scale: (R,) ``sqrt(a)``.
        centres: (K, R) ``sqrt(a) p_c``.
        isotropic: () ``1 / s``, 0 when nothing is left out.
    """

    mean: NDArray[np.float32]
    basis: NDArray[np.float32]
    scale: NDArray[np.float32]
    centres: NDArray[np.float32]
    isotropic: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Centroids:
    """``directions`` (K, F) float32: class means divided by their length."""

    directions: NDArray[np.float32]


class MaxProbabilityScore(nn.Module):
    """``-max(softmax(logits))``, a probability with its sign turned."""

    def forward(self, embedding: Tensor, logits: Tensor) -> Tensor:  # noqa: ARG002 - one signature for all scores
        """(N, F), (N, K) -> (N,)."""
        return -torch.softmax(logits, dim=1).amax(dim=1)


class EnergyScore(nn.Module):
    """``-logsumexp(logits)``, nats."""

    def forward(self, embedding: Tensor, logits: Tensor) -> Tensor:  # noqa: ARG002 - one signature for all scores
        """(N, F), (N, K) -> (N,)."""
        return -torch.logsumexp(logits, dim=1)


class MahalanobisScore(nn.Module):
    """Squared Mahalanobis distance to the nearest class mean, dimensionless."""

    def __init__(self, gaussian: TiedGaussian) -> None:
        super().__init__()
        for name in ("mean", "basis", "scale", "centres", "isotropic"):
            self.register_buffer(name, torch.from_numpy(np.array(getattr(gaussian, name))))

    mean: Tensor
    basis: Tensor
    scale: Tensor
    centres: Tensor
    isotropic: Tensor

    def forward(self, embedding: Tensor, logits: Tensor) -> Tensor:  # noqa: ARG002 - one signature for all scores
        """(N, F), (N, K) -> (N,)."""
        inside = (embedding - self.mean) @ self.basis
        outside = embedding - F.linear(inside, self.basis, self.mean)
        away = (inside * self.scale).unsqueeze(1) - self.centres
        nearest = (away * away).sum(dim=2).amin(dim=1)
        return nearest + (outside * outside).sum(dim=1) * self.isotropic


class CosineScore(nn.Module):
    """``-max_c cos(z, mu_c)``; an embedding of length 0 has the score 0."""

    directions: Tensor

    def __init__(self, centroids: Centroids) -> None:
        super().__init__()
        self.register_buffer("directions", torch.from_numpy(np.array(centroids.directions)))

    def forward(self, embedding: Tensor, logits: Tensor) -> Tensor:  # noqa: ARG002 - one signature for all scores
        """(N, F), (N, K) -> (N,)."""
        length = torch.sqrt((embedding * embedding).sum(dim=1)).clamp(min=_SHORTEST)
        return -F.linear(embedding, self.directions).amax(dim=1) / length


OodScore: TypeAlias = MaxProbabilityScore | EnergyScore | MahalanobisScore | CosineScore


def fit_centroids(embedding: NDArray[np.float32], y: NDArray[np.int64]) -> Centroids:
    """Directions of the class means of source training embeddings, in float64.

    Args:
        embedding: (n, F).
        y: (n,) classes; a class without windows has no direction.

    Raises:
        ShapeError: shapes do not fit, fewer than two windows, or a value is not finite.
    """
    _, means, _ = _class_means(embedding, y)
    lengths = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), _SHORTEST)
    return Centroids(np.ascontiguousarray(means / lengths, np.float32))


def fit_tied_gaussian(
    embedding: NDArray[np.float32], y: NDArray[np.int64], rank: int = DEFAULT_RANK
) -> TiedGaussian:
    """Fit class means and tied covariance to source training embeddings, in float64.

    Args:
        embedding: (n, F).
        y: (n,) classes; a class without windows has no mean.
        rank: r, eigenvalues kept; F or more keeps all (the exact distance).

    Raises:
        ShapeError: shapes do not fit, fewer than two windows, or a value is not finite.
        ConfigError: rank below 1.
    """
    z, means, which = _class_means(embedding, y)
    if rank < 1:
        raise ConfigError(f"the rank of the covariance must be at least 1, got {rank}")
    centred = z - means[which]
    values, vectors = np.linalg.eigh(centred.T @ centred / len(z))
    values, vectors = np.maximum(values[::-1], 0.0) + _RIDGE, vectors[:, ::-1]
    kept = min(rank, z.shape[1])
    isotropic = 0.0 if kept == z.shape[1] else 1.0 / float(values[kept:].mean())
    overall = z.mean(axis=0)
    extra = _span_outside(means - overall, vectors[:, :kept])
    basis = np.concatenate((vectors[:, :kept], extra), axis=1)
    precision = np.concatenate((1.0 / values[:kept], np.full(extra.shape[1], isotropic)))
    return _tied_gaussian(overall, basis, precision, (means - overall) @ basis, isotropic)


def threshold_of(scores: NDArray[np.float32]) -> float:
    """The 95th percentile of the scores of source validation windows: a score above it is out of distribution.

    Raises:
        ShapeError: no score, or one that is not finite.
    """
    if scores.size == 0 or not bool(np.isfinite(scores).all()):
        raise ShapeError(f"the threshold needs finite scores of validation windows, got {scores.size} scores")
    return float(np.quantile(scores.astype(np.float64), _QUANTILE))


def _class_means(
    embedding: NDArray[np.float32], y: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Embeddings (n, F) in float64, means (K, F) of the classes that occur, and the row of each window's mean (n,)."""
    z = np.asarray(embedding, np.float64)
    if z.ndim != 2 or y.shape != z.shape[:1] or len(z) < 2:
        raise ShapeError(
            f"expected embeddings (n, F) and classes (n,) with n >= 2, got {z.shape} and {y.shape}"
        )
    if not bool(np.isfinite(z).all()):
        raise ShapeError("embeddings hold NaN or infinity; the model or its training windows are broken")
    classes, which = np.unique(y, return_inverse=True)
    means = np.stack([z[which == c].mean(axis=0) for c in range(len(classes))])
    return z, means, which.astype(np.int64)


def _tied_gaussian(
    overall: NDArray[np.float64],
    basis: NDArray[np.float64],
    precision: NDArray[np.float64],
    inside: NDArray[np.float64],
    isotropic: float,
) -> TiedGaussian:
    """The terms of D_c; ``inside`` (K, R) are the class means in the coordinates of the basis."""
    scale = np.sqrt(precision)
    return TiedGaussian(
        mean=overall.astype(np.float32),
        basis=np.ascontiguousarray(basis, np.float32),
        scale=scale.astype(np.float32),
        centres=np.ascontiguousarray(scale * inside, np.float32),
        isotropic=np.asarray(isotropic, np.float32),
    )


def _span_outside(rows: NDArray[np.float64], basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """(F, q) orthonormal columns that span what of ``rows`` (K, F) lies outside ``basis`` (F, r)."""
    outside = rows - (rows @ basis) @ basis.T
    _, sizes, directions = np.linalg.svd(outside, full_matrices=False)
    largest = max(float(np.linalg.norm(rows)), np.finfo(np.float64).tiny)
    return np.ascontiguousarray(directions[sizes > _SPAN_TOLERANCE * largest].T)
