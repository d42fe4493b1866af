"""Splits into training and validation windows, and the check that nothing leaks between two sets.

The rules, all seeded:

* ``stratified``: at random, class by class. Windows with overlap then share samples with windows of the other side,
  as in the published benchmark (specs/ood.md 1.3 and pitfall P18): strict mode, the number is reported.
* ``block``: for each person and activity one contiguous block of time; training windows that share a sample with
  it are dropped. The corrected default.
* ``person``: whole persons.
* ``ddlearn-100`` to ``ddlearn-20``: three parts at random, class by class, of which the last is not used in a source
  domain, and so many percent of the training part (specs/ood.md 3.5 and pitfall P26). Leaks as ``stratified`` does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import ConfigError, DataError

from wearfleet_cloud.data.dataset import UNKNOWN_SUBJECT
from wearfleet_cloud.data.three_way import subsample, three_way
from wearfleet_cloud.data.windows import WindowSet

__all__ = [
    "LEAKING_RULES",
    "SPLITS",
    "Split",
    "block_split",
    "leakage_check",
    "person_split",
    "sharing_samples",
    "stratified_split",
    "streams_in_time",
    "three_way_split",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Positions (n,) int64 of the training and validation windows, ascending.

    ``leaking`` counts training windows that share samples with validation ones: above 0 only by :data:`LEAKING_RULES`.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    leaking: int = 0


def sharing_samples(
    windows: WindowSet, index: NDArray[np.int64], other: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which windows share at least one sample of one recording with any of the others.

    Args:
        windows: all windows.
        index: (n,) positions that are asked about.
        other: (m,) positions of the others.

    Returns:
        (n,) bool.
    """
    if len(index) == 0 or len(other) == 0:
        return np.zeros(len(index), np.bool_)
    # One line of time for all recordings, further apart than a window is long.
    reach = int(windows.start.max()) + 2 * windows.length
    place = windows.recording[index] * reach + windows.start[index]
    taken = np.sort(windows.recording[other] * reach + windows.start[other])
    right = np.searchsorted(taken, place)
    after = taken[np.minimum(right, len(taken) - 1)] - place
    before = place - taken[np.maximum(right - 1, 0)]
    shares: NDArray[np.bool_] = (np.abs(after) < windows.length) | (np.abs(before) < windows.length)
    return shares


def streams_in_time(windows: WindowSet, index: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The windows of every person, position, device and activity, each in the order of time.

    Args:
        windows: all windows.
        index: (n,) positions of those to look at.

    Yields:
        Places in ``index``, int64; each place once over all streams.
    """
    origin = (windows.subject, windows.position, windows.device, windows.activity)
    streams = np.stack([np.unique(column[index], return_inverse=True)[1] for column in origin], axis=1)
    in_time = np.lexsort((windows.start[index], windows.recording[index], windows.session[index]))
    for stream in np.unique(streams, axis=0):
        yield in_time[(streams[in_time] == stream).all(axis=1)]


def leakage_check(
    windows: WindowSet, one: NDArray[np.int64], other: NDArray[np.int64], *, persons_apart: bool
) -> None:
    """Refuse two sets of windows that are not independent.

    Args:
        windows: all windows.
        one: positions of one set.
        other: positions of the other.
        persons_apart: True when no person may be in both sets (source against target).

    Raises:
        DataError: windows of the two sets share samples, or a person is in both though none may; says which.
    """
    shared = int(sharing_samples(windows, one, other).sum())
    if shared:
        raise DataError(
            f"leakage: {shared} of {len(one)} windows share samples with the other set; split by block or by person"
        )
    if persons_apart:
        common = sorted(set(windows.subject[one].tolist()) & set(windows.subject[other].tolist()))
        if common:
            raise DataError(
                f"leakage: subjects {', '.join(common)} are in both sets; expected none in common"
            )


def stratified_split(windows: WindowSet, index: NDArray[np.int64], fraction: float, seed: int) -> Split:
    """Each class at random, ``fraction`` of it for validation (strict benchmark rule: overlapping windows leak).

    Args:
        windows: all windows.
        index: (n,) positions to split.
        fraction: share for validation, in (0, 1).
        seed: of the random order.

    Raises:
        ConfigError: the fraction is not in (0, 1).
    """
    _check_fraction(fraction)
    generator = np.random.default_rng(seed)
    held = np.zeros(len(index), np.bool_)
    for label in np.unique(windows.activity[index]):
        of_class = generator.permutation(np.flatnonzero(windows.activity[index] == label))
        held[of_class[: round(len(of_class) * fraction)]] = True
    return _torn_apart(windows, index[~held], index[held])


def three_way_split(
    windows: WindowSet, index: NDArray[np.int64], fraction: float, seed: int, percent: int = 100
) -> Split:
    """Training and validation part of a three-way split, whose test part is left out, and a share of the first.

    Args:
        windows: all windows.
        index: (n,) positions to split.
        fraction: share for validation, and for the part that is left out, in (0, 0.5).
        seed: of the random order.
        percent: of the training part that is kept, class by class.

    Raises:
        ConfigError: the fraction is not in (0, 0.5).
    """
    _check_fraction(fraction)
    labels = windows.activity[index]
    train, validation, _ = three_way(labels, fraction, seed)
    return _torn_apart(windows, index[train[subsample(labels[train], percent, seed)]], index[validation])


def _torn_apart(windows: WindowSet, train: NDArray[np.int64], validation: NDArray[np.int64]) -> Split:
    """Both parts, with the number of training windows that share samples with validation, which is also logged."""
    leaking = int(sharing_samples(windows, train, validation).sum())
    if leaking:
        _log.warning("split at random: %d training windows share samples with validation", leaking)
    return Split(train, validation, leaking)


def block_split(windows: WindowSet, index: NDArray[np.int64], fraction: float, seed: int) -> Split:
    """One contiguous block of time of every person, device and activity for validation.

    The block's place is drawn from the seed. Training windows that share a sample with any block are dropped.

    Args and Raises: as for :func:`stratified_split`.
    """
    _check_fraction(fraction)
    generator = np.random.default_rng(seed)
    held = np.zeros(len(index), np.bool_)
    for order in streams_in_time(windows, index):
        size = round(len(order) * fraction)
        begin = int(generator.integers(len(order) - size + 1))
        held[order[begin : begin + size]] = True
    clash = sharing_samples(windows, index, index[held])
    return Split(index[~held & ~clash], index[held])


def person_split(windows: WindowSet, index: NDArray[np.int64], fraction: float, seed: int) -> Split:
    """Whole persons for validation: ``fraction`` of them, at least one.

    Args: as for :func:`stratified_split`.

    Raises:
        ConfigError: the fraction is not in (0, 1).
        DataError: fewer than two persons, or wearers are unknown.
    """
    _check_fraction(fraction)
    subjects = np.unique(windows.subject[index])
    if len(subjects) < 2 or UNKNOWN_SUBJECT in subjects:
        raise DataError(
            f"splitting by person needs at least two known persons, got {subjects.tolist()}; split by block instead"
        )
    number = min(max(round(len(subjects) * fraction), 1), len(subjects) - 1)
    chosen = np.random.default_rng(seed).permutation(subjects)[:number]
    held = np.isin(windows.subject[index], chosen)
    return Split(index[~held], index[held])


def _check_fraction(fraction: float) -> None:
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"the validation fraction must be between 0 and 1, got {fraction}")


SPLITS: Final[Mapping[str, Callable[[WindowSet, NDArray[np.int64], float, int], Split]]] = {
    "block": block_split,
    "person": person_split,
    "stratified": stratified_split,
    **{f"ddlearn-{percent}": partial(three_way_split, percent=percent) for percent in (100, 80, 60, 40, 20)},
}

LEAKING_RULES: Final = frozenset(SPLITS) - {"block", "person"}
"""Rules that tear overlapping windows apart, as published; what they leak is counted."""
