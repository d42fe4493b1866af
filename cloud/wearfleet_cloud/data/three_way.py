"""Three parts of a domain, class by class at random: to train on, to select by, to test on; and fewer to train on.

The protocol of DDLearn (specs/ood.md 3.5): with a fraction of 0.2, 60 % train, 20 % validation, 20 % test. Sizes are
those of two halvings by scikit-learn's ``train_test_split``: what is not trained on is ``ceil(0.4 n)``, of which the
test part gets the larger half. Only labels are looked at, so windows that overlap are torn apart: that is published
practice, and the split rules built on it count what leaks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from wearfleet_protos.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["apportion", "subsample", "three_way"]


def apportion(counts: NDArray[np.int64], total: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Divide ``total`` seats among classes in proportion to their sizes, by largest remainders.

    A class that would get no seat comes before the remainders of those that have one; ties are drawn.

    Args:
        counts: (K,) members of each class, not all 0.
        total: seats, at most the sum of ``counts``.
        generator: draws ties.

    Returns:
        (K,) seats, which sum to ``total`` and never exceed ``counts``.
    """
    everybody = int(counts.sum())
    seats = counts * total // everybody
    remainder = counts * total % everybody
    order = np.lexsort((generator.random(len(counts)), -remainder, (seats > 0) | (counts == 0)))
    seats[order[: total - int(seats.sum())]] += 1
    return seats


def three_way(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Divide the windows of a domain.

    Args:
        labels: (n,) class of each window, n at least 1.
        fraction: of the validation part and of the test part each, in (0, 0.5).
        seed: of the random order.

    Returns:
        Positions of the training, validation and test part, ascending; each window is in one. A class of one window
        is in the training part wherever that has a seat for every class.

    Raises:
        ConfigError: the fraction is not in (0, 0.5).
    """
    if not 0.0 < fraction < 0.5:
        raise ConfigError(f"the fraction of a three-way split must be between 0 and 0.5, got {fraction}")
    generator = np.random.default_rng(seed)
    every = np.arange(len(labels))
    train = _drawn(labels, len(labels) - math.ceil(2 * fraction * len(labels)), generator)
    rest = np.setdiff1d(every, train)
    validation = rest[_drawn(labels[rest], len(rest) // 2, generator)]
    return train, validation, np.setdiff1d(rest, validation)


def subsample(labels: NDArray[np.int64], percent: int, seed: int) -> NDArray[np.int64]:
    """Positions of ``percent`` of the windows (rounded down), class by class at random, ascending.

    Classes too small for a whole seat get the seats that rounding leaves over, as :func:`apportion` says.

    Args:
        labels: (n,) class of each window.
        percent: 1 to 100.
        seed: of the random order.
    """
    return _drawn(labels, len(labels) * percent // 100, np.random.default_rng(seed))


def _drawn(labels: NDArray[np.int64], total: int, generator: np.random.Generator) -> NDArray[np.int64]:
    if len(labels) == 0:
        return np.empty(0, np.int64)
    classes, counts = np.unique(labels, return_counts=True)
    seats = apportion(counts, total, generator)
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(classes, seats.tolist(), strict=True)
    ]
    return np.sort(np.concatenate(chosen))
