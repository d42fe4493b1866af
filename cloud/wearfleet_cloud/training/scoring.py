"""Scores of a finished model on labelled windows, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from wearfleet_models import Classifier
from wearfleet_protos.errors import ShapeError

from wearfleet_cloud.training.metrics import accuracy_of, evaluate, macro_f1

__all__ = ["ClassScore", "Score", "score"]


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One activity: how many windows it has, the share that was recognised, and its F1 score."""

    activity: str
    windows: int
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class Score:
    """Scores over all windows and by class; rows of ``confusion`` are the actual activities."""

    accuracy: float
    macro_f1: float
    windows: int
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]


def score(model: Classifier, x: NDArray[np.float32], y: NDArray[np.int64], labels: Sequence[str]) -> Score:
    """Score a model.

    Args:
        model: takes raw windows.
        x: (N, C, T), N >= 1.
        y: (N,) index into ``labels``.
        labels: one name a class.

    Raises:
        ShapeError: the model was made for other windows or classes.
        DataError: no window.
    """
    wanted = (model.spec.channels, model.spec.window, model.spec.classes)
    given = (*x.shape[1:], len(labels))
    if given != wanted:
        raise ShapeError(f"the model is for (channels, window, classes) = {wanted}, the data have {given}")
    tensors = model.state_dict()
    device = next(model.parameters()).device
    confusion = evaluate(
        model, tensors, torch.tensor(x, device=device), torch.tensor(y, device=device), len(labels)
    ).cpu()
    right, actual, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    recall = right / actual.clamp(min=1)
    f1 = 2.0 * right / (actual + predicted).clamp(min=1)
    classes = tuple(
        ClassScore(name, int(actual[k]), float(recall[k]), float(f1[k])) for k, name in enumerate(labels)
    )
    rows = tuple(tuple(int(n) for n in row) for row in confusion.tolist())
    return Score(accuracy_of(confusion), macro_f1(confusion), len(y), classes, rows)
