"""Three-way splits and subsampling: the laws of proportion, and scikit-learn as oracle of the sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from wearfleet_cloud.data.three_way import apportion, subsample, three_way
from wearfleet_protos.errors import ConfigError

class_sizes = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)


def labels_of(sizes: list[int], seed: int = 0) -> np.ndarray:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(seed).permutation(labels)


@settings(max_examples=200, deadline=None)
@given(class_sizes, st.floats(0, 1), st.integers(0, 5))
def test_seats_are_proportional_within_one_and_small_classes_come_first(
    sizes: list[int], share: float, seed: int
) -> None:
    counts = np.array(sizes)
    total = int(share * counts.sum())
    seats = apportion(counts, total, np.random.default_rng(seed))
    assert seats.sum() == total
    assert (seats >= 0).all()
    assert (seats <= counts).all()
    assert (np.abs(seats * counts.sum() - counts * total) < counts.sum()).all()
    without = (seats == 0) & (counts > 0)
    above_floor = seats > counts * total // counts.sum()
    if without.any():  # nobody else was rounded up but classes that would have had none either
        assert (seats[above_floor] == 1).all()


@settings(max_examples=100, deadline=None)
@given(class_sizes, st.sampled_from([0.1, 0.2, 0.3]), st.integers(0, 5))
def test_every_window_is_in_one_part(sizes: list[int], fraction: float, seed: int) -> None:
    labels = labels_of(sizes)
    parts = three_way(labels, fraction, seed)
    assert np.sort(np.concatenate(parts)).tolist() == list(range(len(labels)))
    for part, again in zip(parts, three_way(labels, fraction, seed), strict=True):
        assert (np.diff(part) > 0).all()
        np.testing.assert_array_equal(part, again)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(10, 80), min_size=2, max_size=8), st.integers(0, 3))
def test_sizes_are_those_of_scikit_learn(sizes: list[int], seed: int) -> None:
    """Same sizes of the parts; of each class too where largest remainders decide, within one where a tie is drawn."""
    labels = labels_of(sizes)
    train, rest = train_test_split(labels, test_size=0.4, stratify=labels, random_state=seed)
    validation, test = train_test_split(rest, test_size=0.5, stratify=rest, random_state=seed)
    ours = [labels[part] for part in three_way(labels, 0.2, seed)]
    assert [len(part) for part in ours] == [len(train), len(validation), len(test)]
    by_class = [np.bincount(part, minlength=len(sizes)) for part in (ours[0], train)]
    remainders = np.array(sizes) * len(train) % len(labels)
    if len(set(remainders.tolist())) == len(sizes):
        np.testing.assert_array_equal(*by_class)
    assert np.abs(by_class[0] - by_class[1]).max() <= 1


def test_ddlearn_tests_on_905_windows_of_4522() -> None:
    """ceil(0.4 * 4522) = 1809, of which the larger half is 905 (specs/ood.md 5.4)."""
    assert [len(part) for part in three_way(labels_of([238] * 19), 0.2, 1)] == [2713, 904, 905]


def test_the_order_is_drawn_from_the_seed() -> None:
    labels = labels_of([30, 50])
    tests = {tuple(three_way(labels, 0.2, seed)[2].tolist()) for seed in range(10)}
    assert len(tests) == 10


def test_one_window_of_a_class_is_trained_on() -> None:
    for seed in range(20):
        train, *_ = three_way(np.array([0] * 40 + [1]), 0.2, seed)
        assert 40 in train


@settings(max_examples=100, deadline=None)
@given(class_sizes, st.sampled_from([20, 40, 60, 80, 100]), st.integers(0, 5))
def test_a_subsample_has_its_size_and_loses_no_class_that_a_left_over_seat_can_keep(
    sizes: list[int], percent: int, seed: int
) -> None:
    labels = labels_of(sizes)
    kept = subsample(labels, percent, seed)
    assert len(kept) == math.floor(len(labels) * percent / 100)
    assert (np.diff(kept) > 0).all()
    whole = np.array(sizes) * len(kept) // len(labels)
    seatless, left_over = ((whole == 0) & (np.array(sizes) > 0)).sum(), len(kept) - whole.sum()
    lost = len(set(labels.tolist())) - len(set(labels[kept].tolist()))
    assert lost == max(0, seatless - left_over)


def test_nothing_can_be_drawn_from_nothing() -> None:
    assert len(subsample(np.empty(0, np.int64), 20, 0)) == 0


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, float("nan")])
def test_a_fraction_that_leaves_nothing_to_train_on_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"between 0 and 0\.5"):
        three_way(np.zeros(10, np.int64), fraction, 0)
