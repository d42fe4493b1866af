"""PAMAP2, WESAD and MHEALTH on synthetic archives of the official layouts: the real ones could not be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import official_layouts
import pytest
from wearfleet_cloud.data import DATASETS
from wearfleet_cloud.data.dataset import silent
from wearfleet_cloud.data.prepared import counts_of, prepare
from wearfleet_cloud.data.scenarios import open_scenario, person_groups, possible_scenarios
from wearfleet_protos.errors import DataError
from wearfleet_protos.recording import Recording
from wearfleet_protos.windowing import resample

G = 9.80665
Writer = Callable[[Path], None]


def read(name: str, root: Path) -> list[Recording]:
    return list(DATASETS[name].reader.read(root, silent))


def pamap2(root: Path, **changes: np.ndarray) -> np.ndarray:
    """One subject of 60 rows, with columns set to NaN where ``changes`` says: name of a unit -> rows."""
    rows = official_layouts.pamap2_rows(np.repeat([0, 12, 24], 20))
    for place, lost in changes.items():
        first = {"hand": 3, "chest": 20, "ankle": 37}[place]
        rows[lost, first : first + 17] = np.nan
    official_layouts.write_pamap2(root, {101: rows})
    return rows


def test_pamap2_takes_16_g_acceleration_angular_velocity_and_field_of_each_unit(tmp_path: Path) -> None:
    rows = pamap2(tmp_path)
    (recording,) = read("pamap2", tmp_path)
    for place, first in (("hand", 3), ("chest", 20), ("ankle", 37)):
        for sensor, column in (("acc", 1), ("gyro", 7), ("mag", 10)):
            for axis in range(3):
                names = [channel.name for channel in recording.channels]
                own = recording.samples[:, names.index(f"{place}_{sensor}_{'xyz'[axis]}")]
                np.testing.assert_allclose(
                    own, rows[:, first + column + axis], rtol=1e-5
                )  # six digits in the file
    assert recording.labels.tolist() == [-1] * 20 + [7] * 20 + [11] * 20
    assert (recording.subject, recording.rate_hz, len(recording.channels)) == ("101", 100.0, 27)


def test_pamap2_bridges_a_quarter_of_a_second_and_begins_anew_after_more(tmp_path: Path) -> None:
    rows = pamap2(tmp_path, hand=np.arange(5, 30), ankle=np.arange(31, 57))
    before, after = read("pamap2", tmp_path)
    assert (len(before.samples), len(after.samples)) == (31, 3)
    assert (before.session, after.session) == ("0000", "0001")
    np.testing.assert_allclose(before.samples[4:31, 0], np.linspace(rows[4, 4], rows[30, 4], 27), atol=1e-5)
    np.testing.assert_allclose(after.samples[:, 26], rows[57:, 37 + 12], rtol=1e-5)
    assert after.labels.tolist() == [11, 11, 11]


def test_pamap2_begins_anew_where_time_jumps(tmp_path: Path) -> None:
    one, two = official_layouts.pamap2_rows(np.full(5, 1)), official_layouts.pamap2_rows(np.full(4, 1))
    two[:, 0] += 0.07
    official_layouts.write_pamap2(tmp_path, {105: np.concatenate((one, two))})
    assert [len(r.samples) for r in read("pamap2", tmp_path)] == [5, 4]


def test_pamap2_with_a_dead_unit_yields_nothing_of_that_person(tmp_path: Path) -> None:
    rows = official_layouts.pamap2_rows(np.full(300, 4))
    dead = rows.copy()
    dead[:, 20:37] = np.nan
    official_layouts.write_pamap2(tmp_path, {101: rows, 102: dead})
    assert {r.subject for r in read("pamap2", tmp_path)} == {"101"}
    assert counts_of(DATASETS["pamap2"], tmp_path, tmp_path / "cache")["rows_with_lost_values"] == {
        "hand": 0,
        "chest": 300,
        "ankle": 0,
    }
    official_layouts.write_pamap2(tmp_path, {102: dead})
    with pytest.raises(DataError, match="no labelled window in 0 recordings"):
        prepare(DATASETS["pamap2"], tmp_path, tmp_path / "cache")


def test_pamap2_counts_and_person_groups(tmp_path: Path) -> None:
    """Groups {3,2,8}, {1,5}, {0,7}, {4,6} of specs/ood.md 1.2, which counts subject 101 as 0."""
    few = {n: official_layouts.pamap2_rows(np.repeat([1, 24], 250), seed=n) for n in range(101, 110)}
    official_layouts.write_pamap2(tmp_path, few)
    dataset = DATASETS["pamap2"]
    counts = counts_of(dataset, tmp_path, tmp_path / "cache")
    assert (counts["files"], counts["rows"]) == (9, 4500)
    assert counts["rows_by_activity"] == {"lying": 2250, "rope jumping": 2250}
    prepared = prepare(dataset, tmp_path, tmp_path / "cache")
    assert person_groups(prepared) == (("104", "103", "109"), ("102", "106"), ("101", "108"), ("105", "107"))
    assert prepared.windows.x.shape == (9 * 2, 27, 200)  # starts 0 and 300 of 0, 100, 200, 300 have one label
    assert set(possible_scenarios(prepared)) == {"cross-person", "cross-position"}


def test_pamap2_positions_are_domains_of_nine_channels(tmp_path: Path) -> None:
    rows = official_layouts.pamap2_rows(np.full(300, 4))
    official_layouts.write_pamap2(tmp_path, {101: rows})
    scenario = open_scenario(
        DATASETS["pamap2"], "cross-position", ("chest",), seed=0, data_root=tmp_path, cache_dir=tmp_path / "c"
    )
    assert [d.name for d in scenario.sources] == ["hand", "ankle"]
    assert scenario.target.x.shape == (2, 9, 200)
    np.testing.assert_allclose(scenario.target.x[1, 8], rows[100:300, 20 + 12], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: rows[:, :53], "expected 54 numbers"),
        (lambda rows: np.where(np.arange(54) == 1, 9, rows), "expected activities 0 or"),
        (lambda rows: rows[::-1], "a time that grows"),
        (lambda rows: np.where(np.arange(54) == 5, np.inf, rows), "infinity"),
    ],
)
def test_pamap2_refuses_a_malformed_file(
    tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], complaint: str
) -> None:
    official_layouts.write_pamap2(tmp_path, {101: change(official_layouts.pamap2_rows(np.full(5, 1)))})
    with pytest.raises(DataError, match=f"Protocol/subject101.dat.*{complaint}"):
        read("pamap2", tmp_path)


@pytest.mark.parametrize("protocol", [0, 2])
def test_wesad_is_resampled_without_delay_in_canonical_units(tmp_path: Path, protocol: int) -> None:
    """33 of every 700 samples; each new sample has the label of the last original one before it."""
    labels = np.repeat([0, 1, 5, 2, 3, 4, 7], 1400)
    content = official_layouts.wesad_content(labels, "S10")
    chest = content["signal"]["chest"]  # type: ignore[index]
    official_layouts.write_wesad(tmp_path, {10: content}, protocol)
    (recording,) = read("wesad", tmp_path)
    stored = np.concatenate([chest[part] for part, _ in official_layouts.CHEST], axis=1).astype(np.float32)
    assert recording.samples.shape == (7 * 66, 8)
    scale = np.array([G, G, G, 1e-3, 1e-3, 1, 1, 1])
    # units first or rate first: the order of two roundings to float32
    np.testing.assert_allclose(recording.samples, resample(stored, 700, 33) * scale, rtol=1e-5, atol=1e-7)
    assert recording.labels.tolist() == np.repeat([-1, 0, -1, 1, 2, 3, -1], 66).tolist()
    assert (recording.subject, recording.rate_hz, recording.position) == ("10", 33.0, "chest")


@pytest.mark.parametrize(("change", "expected"), [(21, [0, 1, 1, 1]), (22, [0, 0, 1, 1]), (42, [0, 0, 1, 1])])
def test_wesad_labels_are_those_of_the_last_sample_before(
    tmp_path: Path, change: int, expected: list[int]
) -> None:
    """New samples lie at 0, 21.2, 42.4 and 63.6 of the original ones."""
    labels = np.where(np.arange(700) < change, 1, 2)
    official_layouts.write_wesad(tmp_path, {2: official_layouts.wesad_content(labels, "S2")})
    (recording,) = read("wesad", tmp_path)
    assert recording.labels[:4].tolist() == expected


def test_wesad_keeps_slow_signals_and_drops_what_33_hz_cannot_carry(tmp_path: Path) -> None:
    time = np.arange(7000) / 700.0
    content = official_layouts.wesad_content(np.full(7000, 2), "S2")
    chest = content["signal"]["chest"]  # type: ignore[index]
    chest["Resp"][:, 0] = np.sin(2 * np.pi * 0.5 * time)
    chest["EMG"][:, 0] = np.sin(2 * np.pi * 60.0 * time)
    official_layouts.write_wesad(tmp_path, {2: content})
    (recording,) = read("wesad", tmp_path)
    at = np.arange(330) * 700 / 33 / 700.0
    middle = slice(50, 280)  # ends are padded
    # Kaiser window of beta 8.6: ripple below 1e-4 of the amplitude in pass and stop band
    np.testing.assert_allclose(recording.samples[middle, 7], np.sin(np.pi * at)[middle], atol=1e-4)
    assert np.abs(recording.samples[middle, 4]).max() < 1e-3 * 1e-4


@pytest.mark.slow
def test_wesad_counts_and_person_groups(tmp_path: Path) -> None:
    people = [*range(2, 12), *range(13, 18)]
    labels = np.repeat([1, 2, 3, 4, 6], 6300)
    official_layouts.write_wesad(
        tmp_path, {n: official_layouts.wesad_content(labels, f"S{n}") for n in people}
    )
    dataset = DATASETS["wesad"]
    counts = counts_of(dataset, tmp_path, tmp_path / "cache")
    assert (counts["files"], counts["rows"]) == (15, 15 * 31_500)
    assert counts["rows_by_label"] == {str(n): 15 * 6300 if n in {1, 2, 3, 4, 6} else 0 for n in range(8)}
    prepared = prepare(dataset, tmp_path, tmp_path / "cache")
    assert [len(group) for group in person_groups(prepared)] == [4, 4, 4, 3]
    assert prepared.windows.x.shape[1:] == (8, 200)
    assert np.bincount(prepared.windows.activity).tolist() == [
        15,
        15,
        15,
        15,
    ]  # 297 samples a state: one window each


def test_wesad_reads_an_unpacked_folder(tmp_path: Path) -> None:
    content = official_layouts.wesad_content(np.full(700, 1), "S3")
    folder = tmp_path / "WESAD" / "S3"
    folder.mkdir(parents=True)
    (folder / "S3.pkl").write_bytes(official_layouts.python2_pickle(content, 0))
    (recording,) = read("wesad", tmp_path)
    assert recording.samples.shape == (33, 8)


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ("ECG", np.zeros((99, 1)), r"expected finite chest ECG \(100, 1\), got shape \(99, 1\)"),
        ("ACC", np.full((100, 3), np.nan), "expected finite chest ACC"),
        ("EDA", "text", "expected an array under signal / chest / EDA"),
        ("label", np.full(100, 8), "expected labels 0 to 7"),
        ("label", np.zeros((100, 1), np.int32), "expected labels 0 to 7"),
        ("label", 3, "expected an array under label"),
    ],
)
def test_wesad_refuses_a_malformed_file(tmp_path: Path, place: str, value: object, complaint: str) -> None:
    content = official_layouts.wesad_content(np.full(100, 1), "S2")
    holder = content if place == "label" else content["signal"]["chest"]  # type: ignore[index]
    holder[place] = value
    official_layouts.write_wesad(tmp_path, {2: content})
    with pytest.raises(DataError, match=rf"S2/S2\.pkl: {complaint}"):
        read("wesad", tmp_path)


def mhealth_rows(activities: np.ndarray) -> np.ndarray:
    rows = np.tile(np.arange(1.0, 25.0), (len(activities), 1))
    rows[:, 23] = activities
    return rows


def test_mhealth_columns_units_and_labels(tmp_path: Path) -> None:
    official_layouts.write_mhealth(tmp_path, {10: mhealth_rows(np.array([0, 1, 12]))})
    (recording,) = read("mhealth", tmp_path)
    assert recording.labels.tolist() == [-1, 0, 11]
    turn = np.pi / 180
    chest = [1, 2, 3, 4e-3, 5e-3]
    limbs = [
        [a, a + 1, a + 2, (a + 3) * turn, (a + 4) * turn, (a + 5) * turn, a + 6, a + 7, a + 8]
        for a in (6, 15)
    ]
    np.testing.assert_allclose(recording.samples[1], [*chest, *limbs[0], *limbs[1]], rtol=1e-6)
    assert (recording.subject, recording.rate_hz) == ("10", 50.0)


def test_mhealth_limbs_are_positions(tmp_path: Path) -> None:
    people = {n: mhealth_rows(np.repeat([4, 11], 128)) for n in range(1, 11)}
    official_layouts.write_mhealth(tmp_path, people)
    dataset = DATASETS["mhealth"]
    counts = counts_of(dataset, tmp_path, tmp_path / "cache")
    assert (counts["files"], counts["rows"]) == (10, 2560)
    assert counts["rows_by_activity"] == {str(n): 1280 if n in {4, 11} else 0 for n in range(13)}
    scenario = open_scenario(
        dataset, "cross-position", ("arm",), seed=0, data_root=tmp_path, cache_dir=tmp_path / "cache"
    )
    assert [d.name for d in scenario.sources] == ["ankle"]
    assert scenario.target.x.shape == (20, 9, 128)
    np.testing.assert_array_equal(scenario.target.x[0, :, 0][[0, 8]], [15, 23])
    assert len(person_groups(prepare(dataset, tmp_path, tmp_path / "cache"))) == 5


@pytest.mark.parametrize("activity", [13, 0.5, -1])
def test_mhealth_refuses_an_unknown_activity(tmp_path: Path, activity: float) -> None:
    folder = tmp_path / "MHEALTHDATASET"
    folder.mkdir()
    (folder / "mHealth_subject1.log").write_text("\t".join(["0"] * 23 + [str(activity)]))
    with pytest.raises(DataError, match=r"mHealth_subject1\.log: expected activities 0 to 12"):
        read("mhealth", tmp_path)


@pytest.mark.parametrize("name", ["pamap2", "wesad", "mhealth"])
def test_a_root_without_the_set_names_what_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="expected an archive named"):
        read(name, tmp_path)
