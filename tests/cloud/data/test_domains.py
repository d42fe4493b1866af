"""Cross-position, -dataset, -time and -device: what the domains are, what is refused, and that nothing leaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from wearfleet_cloud.data.dataset import Counts, Dataset, Progress
from wearfleet_cloud.data.domains import DIVISIONS
from wearfleet_cloud.data.file_reader import count_recordings
from wearfleet_cloud.data.prepared import Prepared, prepare
from wearfleet_cloud.data.scenarios import (
    build_scenario,
    cross_person,
    open_scenario,
    possible_scenarios,
    split_sources,
)
from wearfleet_cloud.data.sliced import ChannelGroup, SlicedReader
from wearfleet_cloud.data.splits import LEAKING_RULES, SPLITS, sharing_samples
from wearfleet_protos.errors import ConfigError, DataError, NotFoundError
from wearfleet_protos.recording import Channel, Recording

PEOPLE, ACTIVITIES, SECONDS = 4, 3, 24.0
PLACES = ("wrist", "ankle")
AXES = tuple(Channel(axis, "m/s^2") for axis in "xyz")
WHOLE = tuple(Channel(f"{place}_{axis}", "m/s^2") for place in PLACES for axis in "xyz")


@dataclass(frozen=True)
class Two:
    """Two days of each person, every activity once a day, both places in one recording; values tell their origin."""

    def fingerprint(self, root: Path | None) -> str:
        return "two"

    def counts(self, root: Path | None, progress: Progress) -> Counts:
        return count_recordings(self.read(root, progress))

    def read(self, root: Path | None, progress: Progress) -> Iterator[Recording]:
        for person in range(PEOPLE):
            for day in range(2):
                count = round(SECONDS * 10)
                samples = np.arange(ACTIVITIES * count, dtype=np.float32)[:, None] + 1e4 * np.arange(6)
                yield Recording(
                    samples=(samples + 1e5 * day).astype(np.float32),
                    labels=np.repeat(np.arange(ACTIVITIES), count).astype(np.int16),
                    rate_hz=10.0,
                    channels=WHOLE,
                    subject=f"p{person}",
                    position="both",
                    device="unit",
                    session=f"day-{day}",
                )


def dataset(**changes: object) -> Dataset:
    plain = Dataset(
        name="two",
        title="",
        citation="",
        license="",
        channels=WHOLE,
        label_names=("a", "b", "c"),
        rate_hz=10.0,
        window=20,
        stride=10,
        reader=Two(),
    )
    groups = tuple(ChannelGroup(place, tuple(range(3 * k, 3 * k + 3))) for k, place in enumerate(PLACES))
    views = {
        "cross-position": replace(plain, channels=AXES, reader=SlicedReader(Two(), AXES, groups, "position")),
        "cross-device": replace(plain, channels=AXES, reader=SlicedReader(Two(), AXES, groups, "device")),
    }
    return replace(plain, views=views, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache: Path) -> Prepared:
    return prepare(dataset(), None, cache)


@pytest.mark.parametrize(("name", "column"), [("cross-position", "position"), ("cross-device", "device")])
def test_each_place_becomes_a_domain_with_its_own_channels(name: str, column: str, cache: Path) -> None:
    scenario = open_scenario(dataset(), name, ("ankle",), seed=0, data_root=None, cache_dir=cache)
    (source,) = scenario.sources
    assert (source.name, scenario.target.name) == PLACES  # as in the recordings, not by alphabet
    assert source.subjects == scenario.target.subjects == ("p0", "p1", "p2", "p3")
    assert source.x.shape == scenario.target.x.shape
    assert source.x.shape[1:] == (3, 20)
    np.testing.assert_array_equal(scenario.target.x - source.x, np.full_like(source.x, 3e4))
    assert set(getattr(scenario.prepared.windows, column)[scenario.target.index]) == {"ankle"}
    by_number = open_scenario(dataset(), name, 1, seed=0, data_root=None, cache_dir=cache)
    np.testing.assert_array_equal(by_number.target.index, scenario.target.index)


def test_slices_of_one_moment_are_held_out_together(cache: Path) -> None:
    """A block of time is validation at every place, so what was trained on elsewhere was not measured in it."""
    three = dataset()
    groups = (*(ChannelGroup(p, (0, 1, 2)) for p in PLACES), ChannelGroup("hip", (3, 4, 5)))
    view = replace(
        three.views["cross-position"], reader=SlicedReader(Two(), AXES, groups, "position"), version=2
    )
    three = replace(three, views={"cross-position": view})
    scenario = open_scenario(three, "cross-position", ("hip",), seed=5, data_root=None, cache_dir=cache)
    for rule in ("block", "person"):
        split = split_sources(scenario, rule)
        one, other = ([*zip(d.x[:, 0, 0].tolist(), d.y, strict=True)] for d in split.validation)
        assert one == other


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_times_follow_each_other_and_share_no_sample(whole: Prepared, parts: int) -> None:
    prepared = replace(whole, dataset=replace(whole.dataset, time_domains=parts))
    scenario = build_scenario("cross-time", prepared, 0)
    windows = whole.windows
    domains = [scenario.target, *scenario.sources]
    assert [d.name for d in domains] == [f"time {k + 1} of {parts}" for k in range(parts)]
    for person in windows.subjects():
        for label in range(ACTIVITIES):
            places = [
                [
                    (windows.session[i], windows.start[i])
                    for i in d.index
                    if windows.subject[i] == person and windows.activity[i] == label
                ]
                for d in domains
            ]
            assert all(places)
            for earlier, later in pairwise(places):
                assert max(earlier) < min(later)
    for k, one in enumerate(domains):
        for other in domains[k + 1 :]:
            assert not sharing_samples(windows, one.index, other.index).any()


def test_time_is_cut_with_the_least_loss(whole: Prepared) -> None:
    # 2 days x 23 windows an activity; between two halves lies a night, so only cuts within a day lose a window
    half = build_scenario("cross-time", replace(whole, dataset=replace(whole.dataset, time_domains=2)), 0)
    assert len(half.target) + len(half.sources[0]) == len(whole.windows)
    quarters = build_scenario("cross-time", whole, 0)
    kept = len(quarters.target) + sum(map(len, quarters.sources))
    assert len(whole.windows) - kept == 2 * PEOPLE * ACTIVITIES


def test_too_little_time_is_refused(whole: Prepared) -> None:
    many = replace(whole, dataset=replace(whole.dataset, time_domains=100))
    with pytest.raises(DataError, match="too short to be cut into 100 times"):
        build_scenario("cross-time", many, 0)


def test_joined_data_sets_are_told_apart_by_their_subjects(whole: Prepared) -> None:
    names = np.where(np.isin(whole.windows.subject, ["p0", "p3"]), "gym/p", "home/p")
    windows = replace(whole.windows, subject=np.char.add(names, whole.windows.subject))
    joined = replace(whole, windows=windows, dataset=replace(whole.dataset, members=("home", "gym")))
    scenario = build_scenario("cross-dataset", joined, ("gym",))
    assert scenario.target.subjects == ("gym/pp0", "gym/pp3")
    assert [d.subjects for d in scenario.sources] == [("home/pp1", "home/pp2")]


def test_members_without_windows_are_left_out_and_named(
    whole: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    names = np.where(np.isin(whole.windows.subject, ["p0", "p3"]), "gym/p", "home/p")
    windows = replace(whole.windows, subject=np.char.add(names, whole.windows.subject))
    members = ("bus", "home", "gym")
    joined = replace(whole, windows=windows, dataset=replace(whole.dataset, members=members))
    scenario = build_scenario("cross-dataset", joined, 0)
    assert (scenario.target.name, [d.name for d in scenario.sources]) == ("home", ["gym"])
    assert "two without bus: its domains are home, gym" in caplog.text
    alone = replace(joined, dataset=replace(joined.dataset, members=("bus", "home")))
    with pytest.raises(DataError, match="at least two of its members are needed, found: home"):
        build_scenario("cross-dataset", alone, 0)


def test_what_the_data_cannot_give_is_refused_with_reason_and_alternatives(whole: Prepared) -> None:
    plain = replace(whole, dataset=replace(whole.dataset, views={}))
    for name, reason in (
        ("cross-position", r"same position on the body \(both\)"),
        ("cross-device", r"same kind of device \(unit\)"),
        ("cross-dataset", "it is one data set"),
    ):
        with pytest.raises(
            DataError, match=f"two cannot give {name}: .*{reason}.*it can give: cross-person, cross-time$"
        ):
            build_scenario(name, plain, 0)
    assert possible_scenarios(plain) == ("cross-person", "cross-time")
    assert possible_scenarios(whole) == ("cross-person", "cross-position", "cross-time", "cross-device")


def test_recordings_cut_otherwise_must_be_prepared_for_the_scenario(whole: Prepared) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.for_scenario\('cross-position'\)"):
        build_scenario("cross-position", whole, 0)


def test_wrong_names_are_refused_with_the_known_ones(whole: Prepared, cache: Path) -> None:
    with pytest.raises(ConfigError, match=f"known: {', '.join(DIVISIONS)}"):
        open_scenario(dataset(), "cross-planet", 0, seed=0, data_root=None, cache_dir=cache)
    with pytest.raises(ConfigError, match="groups 0 to 3, got target 4; they are: time 1 of 4; time 2"):
        build_scenario("cross-time", whole, 4)
    with pytest.raises(NotFoundError, match=r"noon.*known: time 1 of 4"):
        build_scenario("cross-time", whole, ("noon",))


def test_every_scenario_can_be_split_by_every_rule(whole: Prepared, cache: Path) -> None:
    grouped = replace(whole, dataset=replace(whole.dataset, group_size=2))
    scenarios = [cross_person(grouped, 0), build_scenario("cross-time", whole, 1)]
    scenarios += [
        open_scenario(dataset(), name, 0, seed=1, data_root=None, cache_dir=cache)
        for name in ("cross-position", "cross-device")
    ]
    for scenario in scenarios:
        for rule in SPLITS:
            split = split_sources(scenario, rule)
            train, held = (
                np.concatenate([d.index for d in part]) for part in (split.train, split.validation)
            )
            windows = scenario.prepared.windows
            assert not sharing_samples(windows, np.concatenate([train, held]), scenario.target.index).any()
            assert (split.leaking > 0) == (rule in LEAKING_RULES)


def test_a_description_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2 time domains"):
        dataset(time_domains=1)
    for part in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"target_part must be in \(0, 1\]"):
            dataset(target_part=part)
    with pytest.raises(ConfigError, match="must keep name and labels"):
        replace(dataset(), name="three")
    with pytest.raises(ConfigError, match="expected 3 columns, got 2"):
        SlicedReader(Two(), AXES, (ChannelGroup("hip", (0, 1)),), "position")


def test_counts_of_a_view_are_those_of_the_distribution() -> None:
    view = dataset().views["cross-position"]
    assert view.reader.counts(None, lambda *_: None)["recordings"] == 2 * PEOPLE
