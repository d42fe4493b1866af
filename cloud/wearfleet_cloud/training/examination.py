"""What a run is scored on at every evaluation, and the scoring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from wearfleet_protos.errors import DataError

from wearfleet_cloud.training.metrics import accuracy_of, confusion_matrix, evaluate, macro_f1, predictions
from wearfleet_cloud.training.selection import Scores, mean_over_domains

__all__ = [
    "Examination",
    "MixedWindows",
    "Pairs",
    "Windows",
    "examine",
    "mixed_pairs",
    "mixed_windows",
    "on_device",
    "soft_accuracy",
]

_ALPHA: Final = 0.2
"""Of the Beta distribution of the shares: that of the Mixup algorithm (specs/ood.md 2.2)."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows to score on, on the device: x (N, C, T) raw, y (N,)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class MixedWindows:
    """Mixtures of two windows: x (N, C, T) raw, y and other (N,) the labels, share (N,) of the first."""

    x: Tensor
    y: Tensor
    other: Tensor
    share: Tensor


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything a model is scored on.

    Args:
        validation: held-out windows of each source domain.
        mixed: fixed mixtures of them.
        target: windows of the unseen domain.
    """

    validation: Sequence[Windows]
    mixed: MixedWindows
    target: Windows


class Pairs(NamedTuple):
    """Which held-out windows are mixed: numbers (N,) among those of all domains, and shares (N,) of the first."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    share: NDArray[np.float32]


def mixed_pairs(sizes: Sequence[int], seed: int) -> Pairs:
    """Every held-out window once as the first of a pair, its partner from another domain.

    Args:
        sizes: windows of each source domain; with a single domain partners come from it.
        seed: of partners and shares.

    Raises:
        DataError: no window.

    Source: specs/ood.md 3.8, after Lu et al. 2023, arXiv:2209.00652.
    Differs: a reconstruction; the published text does not fix partners and shares. Ours are drawn once, the share
        from Beta(0.2, 0.2).
    """
    total = sum(sizes)
    if total == 0:
        raise DataError("Mixup validation needs held-out windows, got none")
    generator = np.random.default_rng(seed)
    domain = np.repeat(np.arange(len(sizes)), sizes)
    begin = np.concatenate([[0], np.cumsum(sizes)])
    others = total - np.asarray(sizes)[domain]
    # A number among the windows of the other domains; those from the own domain on are skipped over.
    drawn = (generator.random(total) * np.where(others > 0, others, total)).astype(np.int64)
    skip = (others > 0) & (drawn >= begin[domain])
    second = drawn + np.where(skip, np.asarray(sizes)[domain], 0)
    share = generator.beta(_ALPHA, _ALPHA, total).astype(np.float32)
    return Pairs(np.arange(total), second, share)


def mixed_windows(
    domains: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]], seed: int, device: torch.device
) -> MixedWindows:
    """The Mixup validation set of the held-out windows (x (N, C, T), y (N,)) of each source domain."""
    pairs = mixed_pairs([len(y) for _, y in domains], seed)
    held = on_device(np.concatenate([x for x, _ in domains]), np.concatenate([y for _, y in domains]), device)
    first, second, share = (torch.from_numpy(part).to(device) for part in pairs)
    weight = share[:, None, None]
    x = weight * held.x[first] + (1.0 - weight) * held.x[second]
    return MixedWindows(x, held.y[first], held.y[second], share)


def on_device(x: NDArray[np.float32], y: NDArray[np.int64], device: torch.device) -> Windows:
    """Copy windows to a device."""
    return Windows(torch.tensor(x, device=device), torch.tensor(y, dtype=torch.int64, device=device))


def soft_accuracy(predicted: Tensor, y: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Accuracy when both labels of a mixture count by their share: (), float64, of (N,) each."""
    share = share.double()
    return (share * (predicted == y) + (1.0 - share) * (predicted == other)).mean()


def examine(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    given: Examination,
    classes: int,
    transduced: Tensor | None = None,
) -> Scores:
    """Score a network with given tensors, in evaluation mode.

    Args:
        model: its own tensors are not read.
        tensors: named parameters and buffers.
        given: what to score on.
        classes: K.
        transduced: (N,) classes of the target's windows that the algorithm found, None for those of the network.
    """
    domains = [evaluate(model, tensors, v.x, v.y, classes) for v in given.validation]
    found = predictions(model, tensors, given.target.x) if transduced is None else transduced
    target = confusion_matrix(found, given.target.y, classes)
    mixed = given.mixed
    soft = soft_accuracy(predictions(model, tensors, mixed.x), mixed.y, mixed.other, mixed.share)
    return Scores(
        source_validation_accuracy=mean_over_domains([accuracy_of(domain) for domain in domains]),
        mixup_validation_accuracy=float(soft),
        target_accuracy=accuracy_of(target),
        target_macro_f1=macro_f1(target),
    )
