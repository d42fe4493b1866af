"""Data sets with something wrong or missing: a clear error, or a behaviour that is defined and said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from wearfleet_cloud.data.dataset import Counts, Dataset, Progress
from wearfleet_cloud.data.prepared import Prepared, prepare
from wearfleet_cloud.data.scenarios import cross_person, person_groups, split_sources
from wearfleet_cloud.data.splits import LEAKING_RULES, SPLITS
from wearfleet_cloud.data.standardisation import standardisation_of
from wearfleet_protos.errors import DataError
from wearfleet_protos.recording import Channel, Recording

CHANNELS = (Channel("acc_x", "m/s^2"), Channel("acc_y", "m/s^2"))
Bouts = dict[str, dict[int, int]]
"""Person -> class -> how many windows of 10 samples, apart from each other."""


@dataclass(frozen=True)
class People:
    """Noise, one recording a bout; of a person in ``broken`` the second channel is NaN."""

    bouts: Bouts
    broken: tuple[str, ...] = ()

    def fingerprint(self, root: Path | None) -> str:
        return repr(self)

    def counts(self, root: Path | None, progress: Progress) -> Counts:
        return {}

    def read(self, root: Path | None, progress: Progress) -> Iterator[Recording]:
        random = np.random.default_rng(0)
        for subject, classes in self.bouts.items():
            for label, windows in classes.items():
                samples = random.normal(size=(10 * windows, 2)).astype(np.float32)
                if subject in self.broken:
                    samples[:, 1] = np.nan
                labels = np.full(len(samples), label, np.int16)
                yield Recording(samples, labels, 10.0, CHANNELS, subject, "hip", "unit", f"bout-{label}")


def prepared(tmp_path: Path, bouts: Bouts, broken: tuple[str, ...] = (), **changes: object) -> Prepared:
    dataset = Dataset(
        "few", "", "", "", CHANNELS, ("sit", "walk", "run"), 10.0, 10, 10, People(bouts, broken)
    )
    return prepare(replace(dataset, **changes), None, tmp_path)  # type: ignore[arg-type]


FULL = {0: 20, 1: 20}


def test_a_missing_person_makes_a_smaller_group_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups = (("a", "b"), ("c", "d"))
    data = prepared(tmp_path, {"a": FULL, "b": FULL, "d": FULL}, domain_groups=groups)
    scenario = cross_person(data, 1)
    assert scenario.target.subjects == ("d",)
    assert scenario.sources[0].subjects == ("a", "b")
    assert "few: no windows of c; groups are smaller" in caplog.text


def test_a_group_without_anybody_is_not_counted_and_its_people_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups = (("a",), ("b", "c"), ("d",), ("e",))
    data = prepared(tmp_path, {"a": FULL, "d": FULL, "e": FULL}, domain_groups=groups)
    assert person_groups(data) == (("a",), ("d",), ("e",))
    assert cross_person(data, 1).target.name == "persons d"
    assert "few: no windows of b, c;" in caplog.text


def test_nothing_is_said_when_everybody_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cross_person(prepared(tmp_path, {"a": FULL, "b": FULL}, domain_groups=(("a",), ("b",))), 0)
    assert caplog.text == ""


def test_a_class_only_the_target_has_stays_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = prepared(tmp_path, {"a": FULL, "b": FULL, "c": {**FULL, 2: 4}})
    scenario = cross_person(data, ("c",))
    assert (scenario.target.y == 2).sum() == 4
    assert (
        "persons c: no source has a window of run; every such window of the target counts as an"
        in caplog.text
    )
    caplog.clear()
    cross_person(data, ("a",))  # a class that only a source has is nothing to warn of
    assert caplog.text == ""


def test_a_target_of_one_class_is_a_target(tmp_path: Path) -> None:
    scenario = cross_person(prepared(tmp_path, {"a": FULL, "b": FULL, "c": {1: 5}}), ("c",))
    assert scenario.target.y.tolist() == [1] * 5
    tested = prepared(tmp_path, {"a": FULL, "b": FULL, "c": {1: 10}}, target_part=0.2)
    assert cross_person(tested, ("c",)).target.y.tolist() == [1] * 2


@pytest.mark.parametrize("rule", sorted(set(SPLITS) - {"person"}))
def test_the_only_window_of_a_class_is_trained_on(tmp_path: Path, rule: str) -> None:
    data = prepared(tmp_path, {"a": {**FULL, 2: 1}, "b": FULL, "c": FULL})
    split = split_sources(cross_person(data, ("c",)), rule)
    assert [(d.y == 2).sum() for d in split.train] == [1, 0]
    assert not any((d.y == 2).any() for d in split.validation)


def test_by_person_a_class_goes_where_its_person_goes(tmp_path: Path) -> None:
    data = prepared(
        tmp_path, {"a": {**FULL, 2: 1}, "b": FULL, "c": FULL, "d": FULL}, domain_groups=(("a", "b", "c"),)
    )
    scenario = cross_person(data, ("d",))
    places = set()
    for seed in range(8):
        split = split_sources(replace(scenario, seed=seed), "person")
        (trained,), (held) = ([(d.y == 2).sum() for d in part] for part in (split.train, split.validation))
        assert trained + held[0] == 1
        places.add(int(trained))
    assert places == {0, 1}


@pytest.mark.parametrize("rule", sorted(set(SPLITS) - {"person"}))
def test_a_domain_too_small_for_both_parts_is_refused(tmp_path: Path, rule: str) -> None:
    data = prepared(tmp_path, {"a": {0: 1, 1: 1}, "b": FULL, "c": FULL})
    if rule in LEAKING_RULES - {
        "stratified"
    }:  # of 2 windows 1 is trained on, and 0 and 1 are the halves of the other
        complaint = "source domain persons a: rule .* makes . training and 0 validation windows of 2"
    else:
        complaint = "source domain persons a: rule .* makes 2 training and 0 validation windows of 2"
    with pytest.raises(DataError, match=complaint):
        split_sources(cross_person(data, ("c",)), rule)


def test_a_channel_of_nan_is_refused_with_person_and_session(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data set few, subject b, session bout-0: samples hold NaN.*interpolate or split"
    ):
        prepared(tmp_path, {"a": FULL, "b": FULL}, ("b",))
    assert [path.name for path in tmp_path.iterdir()] == []  # no half-built cache


def test_a_dead_channel_becomes_zero_and_does_not_divide_by_nothing() -> None:
    x = np.zeros((4, 2, 10), np.float32)
    x[:, 0] = 7.5
    mean, std = standardisation_of(x)
    assert ((x - mean[:, None]) / std[:, None] == 0.0).all()
    assert std.tolist() == [1.0, 1.0]


def test_a_set_without_any_labelled_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no labelled window in 0 recordings"):
        prepared(tmp_path, {})
