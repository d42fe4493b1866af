"""Scores of a classifier, all from its confusion matrix."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from wearfleet_protos.errors import DataError

__all__ = ["accuracy_of", "confusion_matrix", "evaluate", "macro_f1", "predictions"]

_EVALUATION_BATCH = 1024


def confusion_matrix(predicted: Tensor, actual: Tensor, classes: int) -> Tensor:
    """Counts of every pair (actual, predicted): (K, K) int64, rows actual; arguments (N,) int64 in [0, K)."""
    return torch.bincount(actual * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def accuracy_of(confusion: Tensor) -> float:
    """Share of right answers.

    Raises:
        DataError: nothing was counted.
    """
    total = int(confusion.sum())
    if total == 0:
        raise DataError("accuracy needs at least one window, got none")
    return float(confusion.diagonal().sum()) / total


def macro_f1(confusion: Tensor) -> float:
    """Mean F1 score of the classes that occur among actual or predicted labels.

    Raises:
        DataError: nothing was counted.

    Source: as ``sklearn.metrics.f1_score(average="macro")``.
    """
    right = confusion.diagonal().double()
    found = confusion.sum(dim=0) + confusion.sum(dim=1)
    if int(found.sum()) == 0:
        raise DataError("macro-F1 needs at least one window, got none")
    scores = 2.0 * right / found.clamp(min=1)
    return float(scores[found > 0].mean())


def predictions(model: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Classes that a network with given tensors predicts, in evaluation mode.

    Args:
        model: its own tensors are not read; its mode is restored.
        tensors: named parameters and buffers.
        x: (N, C, T) raw windows.

    Returns:
        (N,) int64 on the device of ``x``.
    """
    training = model.training
    model.eval()
    found = [torch.zeros(0, dtype=torch.int64, device=x.device)]
    try:
        with torch.no_grad():
            for first in range(0, len(x), _EVALUATION_BATCH):
                part = x[first : first + _EVALUATION_BATCH]
                found.append(functional_call(model, dict(tensors), (part,)).argmax(dim=1))
    finally:
        model.train(training)
    return torch.cat(found)


def evaluate(model: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, classes: int) -> Tensor:
    """Confusion matrix (K, K) int64 of ``predictions``; ``y`` (N,) int64 are the actual classes, ``classes`` is K."""
    return confusion_matrix(predictions(model, tensors, x), y, classes)
