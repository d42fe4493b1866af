"""The readers find in the real distributions what their README files state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache as remembered
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from wearfleet_cloud.data import DATASETS, dsads, emg, hapt, uci_har, usc_had, wisdm
from wearfleet_cloud.data.dataset import UNKNOWN_SUBJECT, Progress, silent
from wearfleet_cloud.data.file_reader import FileReader
from wearfleet_cloud.data.layout import Source
from wearfleet_cloud.data.prepared import Prepared, counts_of, prepare
from wearfleet_cloud.data.scenarios import (
    cross_person,
    open_scenario,
    person_groups,
    possible_scenarios,
    split_sources,
)
from wearfleet_protos.errors import DataError

pytestmark = [pytest.mark.data, pytest.mark.slow]

README: dict[str, dict[str, Any]] = {
    "hapt": {
        "experiments": 61,
        "users": 30,
        "acc_rows": 1_122_772,
        "gyro_rows": 1_122_772,
        "label_rows": 1_214,
        "activities": 12,
        "official_train_windows": 7_767,
        "official_train_users": 21,
        "official_test_windows": 3_162,
        "official_test_users": 9,
    },
    "uci-har": {
        "train_windows": 2_400,
        "train_classes": {"1": 400, "2": 350, "3": 322, "4": 420, "5": 449, "6": 459},
        "train_users": 0,
        "official_train_labels": 7_352,
        "official_train_users": 21,
        "test_windows": 950,
        "test_classes": {"1": 160, "2": 152, "3": 135, "4": 158, "5": 172, "6": 173},
        "test_users": 0,
        "official_test_labels": 2_947,
        "official_test_users": 9,
    },
    "usc-had": {
        "files": 840,
        "subjects": 14,
        "activities": 12,
        "trials_each": 5,
        "rows": 2_811_490,
        "misspelled_activity_field": 1,
        "activity_field_disagrees": 1,
        "extra_comments_field": 3,
    },
    "dsads": {
        "files": 3_040,
        "subjects": 8,
        "activities": 19,
        "segments_each": 20,
        "rows": 3_040 * 125,
        "columns": 45,
    },
    "emg": {
        "files": 64,
        "subjects": 33,
        "subjects_with_both_series": 31,
        "rows": 3_636_694,
        "rows_by_class": {
            "0": 2_330_550,
            "1": 216_529,
            "2": 212_600,
            "3": 217_158,
            "4": 219_421,
            "5": 220_517,
            "6": 219_919,
            "7": 0,
        },
    },
    "wisdm-51": {
        "files": 24,
        "subjects": 6,
        "files_with_all_activities": 24,
        "rows": {
            "phone accel": 385_885,
            "phone gyro": 385_470,
            "watch accel": 390_335,
            "watch gyro": 390_133,
        },
    },
}


_CONTENT = {
    dsads: "_segments",
    emg: "_series",
    hapt: "_load",
    uci_har: "_load",
    usc_had: "_trials",
    wisdm: "_streams",
}
"""Module of a reader -> its function that reads and parses every file of a distribution."""


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """Counting, preparing, viewing, stringing and joining a data set all start from its files, parsed but once."""

    def once(parse: Callable[[Source, Progress], Any]) -> Callable[[Source, Progress], Any]:
        @remembered
        def content(source: Source) -> Any:
            found = parse(source, silent)
            return tuple(found) if isinstance(found, Iterator) else found

        return lambda source, _: content(source)

    with pytest.MonkeyPatch.context() as patch:
        for module, name in _CONTENT.items():
            patch.setattr(module, name, once(getattr(module, name)))
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.cache_of_run(tmp_path_factory)


def load(name: str, cache: Path) -> Prepared:
    return prepare(DATASETS[name], datasets.data_root(), cache)


@pytest.mark.parametrize("name", sorted(README))
def test_the_counts_are_those_of_the_readme(name: str, cache: Path) -> None:
    assert counts_of(DATASETS[name], datasets.data_root(), cache) == README[name]


@pytest.mark.parametrize(
    ("name", "windows", "groups"),
    [
        ("hapt", 10_013, 5),
        ("usc-had", 27_205, 4),
        ("dsads", 3_040, 4),
        ("emg", 11_553, 4),
        ("wisdm-51", 15_114, 3),
        ("dsads-ddlearn", 5_928, 4),
        ("usc-had-ddlearn", 10_139, 5),
    ],
)
def test_every_labelled_window_is_in_one_person_group(
    name: str, windows: int, groups: int, cache: Path
) -> None:
    prepared = load(name, cache)
    assert len(prepared.windows) == windows
    members = person_groups(prepared)
    assert len(members) == groups
    assert sorted(s for group in members for s in group) == list(prepared.windows.subjects())
    assert np.bincount(prepared.windows.activity).min() > 0


def test_uci_har_windows_come_back_exactly_and_persons_are_refused(cache: Path) -> None:
    prepared = load("uci-har", cache)
    assert np.bincount(prepared.windows.activity).tolist() == [560, 502, 457, 578, 621, 632]
    assert prepared.subjects == (UNKNOWN_SUBJECT,)
    with pytest.raises(DataError, match="does not say who wore the sensor"):
        cross_person(prepared, 0)


def test_dsads_stairs_are_cut_where_walking_goes_on(cache: Path) -> None:
    """Why segments are not joined: over a border the signal steps like inside when walking, and far more on stairs."""
    recordings = load("dsads", cache).recordings_of("2")

    def border_against_inside(label: int) -> float:
        samples = np.stack([r.samples for r in recordings if r.labels[0] == label])
        inside = np.abs(np.diff(samples, axis=1)).mean(axis=(0, 1))
        border = np.abs(samples[1:, 0] - samples[:-1, -1]).mean(axis=0)
        return float(np.median(border / inside))

    labels = DATASETS["dsads"].label_names
    assert border_against_inside(labels.index("walking on a flat treadmill")) < 1.3
    assert border_against_inside(labels.index("ascending stairs")) > 2.0


def test_gravity_has_its_length_in_canonical_units(cache: Path) -> None:
    """Standing still, a calibrated accelerometer reads about 9.8 m/s^2 in whatever direction."""
    for name, label in (
        ("hapt", "standing"),
        ("usc-had", "standing"),
        ("dsads", "standing"),
        ("wisdm-51", "standing"),
    ):
        windows = load(name, cache).windows
        still = windows.x[windows.activity == DATASETS[name].label_names.index(label)][:, :3].mean(axis=2)
        assert np.median(np.linalg.norm(still, axis=1)) == pytest.approx(9.8, rel=0.05), name


def test_a_truncated_real_archive_leaves_no_cache_entry(tmp_path: Path) -> None:
    reader = DATASETS["hapt"].reader
    assert isinstance(reader, FileReader)
    source = reader.layout.locate(datasets.data_root())
    if source.kind == "folder":
        pytest.skip("HAPT is unpacked here")
    (tmp_path / source.path.name).write_bytes(source.path.read_bytes()[: source.path.stat().st_size // 3])
    with pytest.raises(DataError, match="truncated or damaged"):
        prepare(DATASETS["hapt"], tmp_path, tmp_path / "cache", silent)
    assert list((tmp_path / "cache").iterdir()) == []


def times(*windows: int) -> dict[str, int]:
    return {f"time {k} of {len(windows)}": number for k, number in enumerate(windows, 1)}


SCENARIOS: dict[tuple[str, str], dict[str, int]] = {
    ("dsads", "cross-position"): dict.fromkeys(
        ("torso", "right_arm", "left_arm", "right_leg", "left_leg"), 3_040
    ),
    ("dsads", "cross-device"): dict.fromkeys(("accelerometer", "gyroscope", "magnetometer"), 3_040),
    ("dsads", "cross-time"): times(760, 760, 760, 760),
    ("wisdm-51", "cross-position"): {"phone": 7_560, "watch": 7_554},
    ("wisdm-51", "cross-device"): {"smartphone": 7_560, "smartwatch": 7_554},
    # DSADS: 7 of 19 activities x 160 segments x 4 windows
    ("har-common", "cross-dataset"): {"dsads": 4_480, "usc-had": 16_211, "hapt": 13_279},
    ("har-common-strict", "cross-dataset"): {"dsads": 4_480, "usc-had": 16_211, "hapt": 13_286},
    ("hapt", "cross-time"): times(1_910, 1_829, 1_824, 1_835, 1_922),
    ("usc-had", "cross-time"): times(6_705, 6_619, 6_648, 6_740),
    ("emg", "cross-time"): times(2_811, 2_698, 2_771, 2_820),
    ("wisdm-51", "cross-time"): times(3_670, 3_456, 3_669, 3_671),
}


@pytest.mark.parametrize(("name", "scenario"), sorted(SCENARIOS))
def test_scenarios_have_these_domains_with_all_classes_and_no_leak(
    name: str, scenario: str, cache: Path
) -> None:
    dataset, root = DATASETS[name], datasets.data_root()
    first = open_scenario(dataset, scenario, 0, seed=0, data_root=root, cache_dir=cache)
    domains = [first.target, *first.sources]
    assert {d.name: len(d) for d in domains} == SCENARIOS[name, scenario]
    for domain in domains:
        assert np.bincount(domain.y, minlength=len(dataset.label_names)).min() > 0
    assert split_sources(first).leaking == 0


@pytest.mark.parametrize("name", sorted(README))
def test_every_data_set_gives_just_the_scenarios_its_data_carry(name: str, cache: Path) -> None:
    more = {
        "dsads": {"cross-position", "cross-device"},
        "wisdm-51": {"cross-position", "cross-device"},
    }
    expected = set() if name == "uci-har" else {"cross-person", "cross-time"} | more.get(name, set())
    assert set(possible_scenarios(load(name, cache))) == expected


def test_common_axes_point_up_and_forward_in_every_member(cache: Path) -> None:
    """Gravity lies on x standing; lying, on y more than on z, and on neither for nobody but side sleepers."""
    windows = load("har-common", cache).windows
    labels = DATASETS["har-common"].label_names
    members = ("dsads", "usc-had", "hapt")
    assert set(np.unique([s.partition("/")[0] for s in windows.subjects()])) == set(
        members
    )  # PAMAP2 is not here
    for member in members:
        own = np.char.startswith(windows.subject, member)
        stand, lie = (
            windows.x[own & (windows.activity == labels.index(label))][:, :3].mean(axis=2)
            for label in ("standing", "lying")
        )
        assert np.median(stand, axis=0)[0] == pytest.approx(9.5, abs=0.5), member
        upright = np.abs(np.median(lie, axis=0))
        assert upright[0] < 7.0, member
        assert np.abs(lie[:, 1]).mean() > np.abs(stand[:, 1]).mean() + 2.0, member


def test_strict_units_differ_between_the_members(cache: Path) -> None:
    windows = load("har-common-strict", cache).windows
    standing = windows.activity == DATASETS["har-common"].label_names.index("standing")
    for member, gravity in (("dsads", 9.8), ("usc-had", 1.0), ("hapt", 1.0)):
        own = windows.x[standing & np.char.startswith(windows.subject, member)][:, :3].mean(axis=2)
        assert np.median(np.linalg.norm(own, axis=1)) == pytest.approx(gravity, rel=0.05)
