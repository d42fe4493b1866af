"""The whole of what is exported: classifier and out-of-distribution score behind one input."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor, nn
from wearfleet_models import Classifier
from wearfleet_protos.errors import ConfigError, ShapeError
from wearfleet_protos.manifest import MODEL_OUTPUTS

from wearfleet_cloud.export.ood_score import (
    DEFAULT_METHOD,
    DEFAULT_RANK,
    OOD_METHODS,
    Centroids,
    CosineScore,
    EnergyScore,
    MahalanobisScore,
    MaxProbabilityScore,
    OodMethod,
    OodScore,
    TiedGaussian,
    fit_centroids,
    fit_tied_gaussian,
    threshold_of,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["OodStatistics", "ScoredClassifier", "embed", "fit_ood", "outputs_of", "scored_classifier"]

_BATCH: Final = 512


@dataclass(frozen=True, slots=True, eq=False)
class OodStatistics:
    """A fitted score.

    Args:
        method: which score.
        threshold: a score above it is out of distribution.
        fitted: what was learned of the training windows: the distance or the centroids, None for the others.
    """

    method: OodMethod
    threshold: float
    fitted: TiedGaussian | Centroids | None


class ScoredClassifier(nn.Module):
    """Logits, probabilities, embedding and score of raw windows.

    The parts of the classifier are registered under their own names, so that every tensor is called here, and in
    the exported graph, as in the classifier's ``state_dict``.
    """

    def __init__(self, model: Classifier, score: OodScore) -> None:
        super().__init__()
        self.standardise = model.standardise
        self.surgery = model.surgery
        self.backbone = model.backbone
        self.neck = model.neck
        self.head = model.head
        self.remap = model.remap
        self.ood = score

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, C, T) raw units -> logits (N, K), probabilities (N, K), embedding (N, F), ood_score (N,)."""
        embedding = self.neck(self.backbone(self.surgery(self.standardise(window)), None, None), None)
        logits = self.remap(self.head(embedding))
        return logits, torch.softmax(logits, dim=1), embedding, self.ood(embedding, logits)


def scored_classifier(model: Classifier, ood: OodStatistics) -> ScoredClassifier:
    """A copy of the model in evaluation mode on the CPU, with its score; the model is left as it was.

    Raises:
        ConfigError: the statistics do not belong to their method.
    """
    return ScoredClassifier(copy.deepcopy(model).cpu(), _score(ood)).eval()


def fit_ood(
    model: Classifier,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    x_validation: NDArray[np.float32],
    *,
    method: OodMethod = DEFAULT_METHOD,
    rank: int = DEFAULT_RANK,
) -> OodStatistics:
    """Fit the score on source training windows and its threshold on source validation windows.

    Args:
        model: trained.
        x: (n, C, T) raw source training windows.
        y: (n,) their classes.
        x_validation: (m, C, T) raw source validation windows.
        method: which score.
        rank: of the covariance, see :mod:`wearfleet_cloud.export.ood_score`.

    Raises:
        ConfigError: unknown method.
        ShapeError: no windows, or values that are not finite.
    """
    if method not in OOD_METHODS:
        raise ConfigError(f"unknown out-of-distribution score {method!r}; known: {', '.join(OOD_METHODS)}")
    fitted: TiedGaussian | Centroids | None = None
    if method == "mahalanobis":
        fitted = fit_tied_gaussian(embed(model, x), y, rank)
    elif method == "cosine":
        fitted = fit_centroids(embed(model, x), y)
    unset = OodStatistics(method, 0.0, fitted)
    scores = outputs_of(scored_classifier(model, unset), x_validation)["ood_score"]
    return OodStatistics(method, threshold_of(scores), fitted)


def embed(model: Classifier, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, C, T) raw windows -> (n, F) embeddings in evaluation mode.

    Raises:
        ShapeError: no windows.
    """
    return outputs_of(ScoredClassifier(copy.deepcopy(model).cpu(), EnergyScore()).eval(), x)["embedding"]


def outputs_of(scored: ScoredClassifier, x: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """The four outputs of raw windows (n, C, T), by torch.

    Raises:
        ShapeError: no windows.
    """
    if x.ndim != 3 or len(x) == 0:
        raise ShapeError(f"expected at least one window (n, C, T), got shape {x.shape}")
    with torch.no_grad():
        parts = [scored(torch.from_numpy(np.array(x[i : i + _BATCH]))) for i in range(0, len(x), _BATCH)]
    columns = zip(*parts, strict=True)
    return {name: torch.cat(column).numpy() for name, column in zip(MODEL_OUTPUTS, columns, strict=True)}


def _score(ood: OodStatistics) -> OodScore:
    match ood.method, ood.fitted:
        case "max-probability", None:
            return MaxProbabilityScore()
        case "energy", None:
            return EnergyScore()
        case "mahalanobis", TiedGaussian():
            return MahalanobisScore(ood.fitted)
        case "cosine", Centroids():
            return CosineScore(ood.fitted)
    raise ConfigError(f"method {ood.method!r} does not fit the statistics given; fit them with fit_ood")
