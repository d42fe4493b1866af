"""Splits and the leakage check, against brute force."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wearfleet_cloud.data.splits import (
    SPLITS,
    block_split,
    leakage_check,
    person_split,
    sharing_samples,
    stratified_split,
)
from wearfleet_cloud.data.windows import WindowSet
from wearfleet_protos.errors import ConfigError, DataError, ShapeError

LENGTH = 10


def windows(*, people: int = 4, recordings: int = 2, per_recording: int = 30, stride: int = 5) -> WindowSet:
    """Each recording holds three activities one after the other."""
    rows = [
        (f"p{person}", f"s{number}", person * recordings + number, k * stride, k * 3 // per_recording)
        for person in range(people)
        for number in range(recordings)
        for k in range(per_recording)
    ]
    subject, session, recording, start, activity = (np.array(column) for column in zip(*rows, strict=True))
    constant = np.full(len(rows), "waist")
    x = np.zeros((len(rows), 1, LENGTH), np.float32)
    return WindowSet(x, activity, subject, constant, constant, session, recording, start)


def brute_force_sharing(w: WindowSet, one: np.ndarray, other: np.ndarray) -> list[bool]:
    return [
        any(w.recording[i] == w.recording[j] and abs(w.start[i] - w.start[j]) < LENGTH for j in other)
        for i in one
    ]


ALL = windows()
EVERY = np.arange(len(ALL))


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, len(ALL) - 1), max_size=25), st.sets(st.integers(0, len(ALL) - 1), max_size=25))
def test_sharing_samples_equals_comparing_every_pair(one: set[int], other: set[int]) -> None:
    a, b = np.array(sorted(one), np.int64), np.array(sorted(other), np.int64)
    assert sharing_samples(ALL, a, b).tolist() == brute_force_sharing(ALL, a, b)


@pytest.mark.parametrize("rule", ["block", "person"])
@pytest.mark.parametrize("seed", range(5))
def test_block_and_person_splits_never_leak(rule: str, seed: int) -> None:
    split = SPLITS[rule](ALL, EVERY, 0.2, seed)
    leakage_check(ALL, split.train, split.validation, persons_apart=rule == "person")
    assert not any(brute_force_sharing(ALL, split.train, split.validation))
    assert np.intersect1d(split.train, split.validation).size == 0


def test_the_stratified_split_leaks_as_published_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        split = stratified_split(ALL, EVERY, 0.2, 0)
    assert split.leaking == sum(brute_force_sharing(ALL, split.train, split.validation)) > 0
    assert f"{split.leaking} training windows" in caplog.text
    assert np.bincount(ALL.activity[split.validation]).tolist() == [16, 16, 16]  # a fifth of 80 each
    assert len(split.train) + len(split.validation) == len(ALL)


def test_the_stratified_split_does_not_leak_without_overlap() -> None:
    apart = windows(stride=LENGTH)
    assert stratified_split(apart, np.arange(len(apart)), 0.2, 0).leaking == 0


@pytest.mark.parametrize("percent", [20, 40, 60, 80, 100])
def test_the_three_way_split_keeps_so_much_to_train_on_and_counts_its_leaks(percent: int) -> None:
    """240 windows: 144 to train on, 48 to select by, 48 left out."""
    split = SPLITS[f"ddlearn-{percent}"](ALL, EVERY, 0.2, 0)
    assert (len(split.train), len(split.validation)) == (144 * percent // 100, 48)
    assert np.intersect1d(split.train, split.validation).size == 0
    assert split.leaking == sum(brute_force_sharing(ALL, split.train, split.validation)) > 0
    whole = SPLITS["ddlearn-100"](ALL, EVERY, 0.2, 0)
    assert set(split.train) <= set(whole.train)
    np.testing.assert_array_equal(split.validation, whole.validation)


def test_a_part_of_a_set_is_split_by_positions_in_the_whole() -> None:
    some = ALL.of_subjects(("p1", "p3"))
    for rule in SPLITS:
        split = SPLITS[rule](ALL, some, 0.2, 0)
        assert set(split.train) | set(split.validation) <= set(some)
        assert (np.diff(split.train) > 0).all()
        assert (np.diff(split.validation) > 0).all()


def test_a_block_is_one_stretch_of_each_person_and_activity() -> None:
    split = block_split(ALL, EVERY, 0.2, 3)
    for person in ALL.subjects():
        for label in range(3):
            own = np.flatnonzero((ALL.subject == person) & (ALL.activity == label))  # already in time order
            held = np.flatnonzero(np.isin(own, split.validation))
            assert len(held) == round(len(own) * 0.2)
            assert np.ptp(held) == len(held) - 1
    assert len(split.train) > 0.6 * len(ALL)  # only neighbours of the blocks are dropped


def test_person_split_holds_out_whole_persons() -> None:
    split = person_split(ALL, EVERY, 0.2, 0)
    assert len(set(ALL.subject[split.validation])) == 1
    assert len(split.validation) == 60


@pytest.mark.parametrize("rule", sorted(SPLITS))
def test_a_split_follows_its_seed(rule: str) -> None:
    one, same = SPLITS[rule](ALL, EVERY, 0.25, 1), SPLITS[rule](ALL, EVERY, 0.25, 1)
    np.testing.assert_array_equal(one.validation, same.validation)
    others = [SPLITS[rule](ALL, EVERY, 0.25, seed).validation.tolist() for seed in range(2, 12)]
    assert any(other != one.validation.tolist() for other in others)


def test_leakage_is_a_typed_error_that_says_what_leaks() -> None:
    with pytest.raises(DataError, match="1 of 1 windows share samples"):
        leakage_check(ALL, np.array([0]), np.array([1]), persons_apart=False)
    leakage_check(ALL, np.array([0]), np.array([2]), persons_apart=False)
    with pytest.raises(DataError, match="subjects p0 are in both"):
        leakage_check(ALL, np.array([0]), np.array([2]), persons_apart=True)


def test_one_person_cannot_be_split_by_person() -> None:
    with pytest.raises(DataError, match="at least two known persons"):
        person_split(ALL, ALL.of_subjects(("p1",)), 0.2, 0)


@pytest.mark.parametrize("rule", sorted(SPLITS))
@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_senseless_fraction_is_refused(rule: str, fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        SPLITS[rule](ALL, EVERY, fraction, 0)


def test_a_window_set_checks_its_columns() -> None:
    with pytest.raises(ShapeError, match="seven columns"):
        WindowSet(ALL.x[:-1], *(getattr(ALL, n) for n in WindowSet.__slots__[1:]))
