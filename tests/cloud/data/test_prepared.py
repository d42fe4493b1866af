"""Preparing once, loading again, and never leaving half a cache entry."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from wearfleet_cloud.data.dataset import INERTIAL6, Counts, Dataset, Progress, silent
from wearfleet_cloud.data.layout import Layout
from wearfleet_cloud.data.prepared import Prepared, counts_of, prepare, write_replays
from wearfleet_protos.errors import DataError, NotFoundError, WearfleetError
from wearfleet_protos.recording import Recording, load_recordings
from wearfleet_protos.windowing import WindowSpec, cut, cut_labelled


@dataclass(frozen=True)
class FewRecordings:
    """A reader whose recordings are given; it may break after the first."""

    recordings: tuple[Recording, ...]
    mark: str = "1"
    break_with: WearfleetError | None = None

    def fingerprint(self, root: Path | None) -> str:
        return self.mark

    def read(self, root: Path | None, progress: Progress) -> Iterator[Recording]:
        for number, recording in enumerate(self.recordings):
            if number and self.break_with is not None:
                raise self.break_with
            progress("reading", number + 1, len(self.recordings))
            yield recording

    def counts(self, root: Path | None, progress: Progress) -> Counts:
        return {"recordings": len(self.recordings)}


def recording(subject: str, session: str, labels: list[int], seed: int = 0) -> Recording:
    samples = np.random.default_rng(seed).normal(size=(len(labels), 6)).astype(np.float32)
    return Recording(samples, np.array(labels, np.int16), 50.0, INERTIAL6, subject, "waist", "watch", session)


ANNA_2 = recording("anna", "2", [0] * 25 + [1] * 25, 1)
ANNA_1 = recording("anna", "1", [2] * 20 + [-1] * 3 + [0] * 20, 2)
BERT_1 = recording("bert", "1", [1] * 8, 3)


def dataset(*recordings: Recording, **changes: object) -> Dataset:
    description = Dataset(
        name="few",
        title="few",
        citation="none",
        license="none",
        channels=INERTIAL6,
        label_names=("sit", "stand"),
        other_labels=("rise",),
        rate_hz=50.0,
        window=10,
        stride=5,
        reader=FewRecordings(recordings or (ANNA_2, ANNA_1, BERT_1)),
    )
    return replace(description, **changes)


def test_the_windows_are_those_of_the_shared_windowing(tmp_path: Path) -> None:
    windows = prepare(dataset(), None, tmp_path).windows
    expected = cut_labelled((ANNA_2,), WindowSpec(10, 5, 50.0)).labelled()
    first = windows.recording == 0
    np.testing.assert_array_equal(windows.x[first], expected.x)
    np.testing.assert_array_equal(windows.activity[first], expected.y)
    np.testing.assert_array_equal(windows.start[first], expected.start)
    assert set(windows.session[first]) == {"2"}


def test_extra_labels_make_no_windows_and_are_unlabelled_in_recordings(tmp_path: Path) -> None:
    prepared = prepare(dataset(), None, tmp_path)
    assert set(prepared.windows.activity.tolist()) == {0, 1}
    earlier = prepared.recordings_of("anna")[0]
    assert earlier.labels.tolist() == [-1] * 23 + [0] * 20


def test_recordings_come_back_in_time_order_and_whole(tmp_path: Path) -> None:
    prepared = prepare(dataset(), None, tmp_path)
    assert prepared.subjects == ("anna", "bert")
    assert [r.session for r in prepared.recordings_of("anna")] == ["1", "2"]
    np.testing.assert_array_equal(prepared.recordings_of("anna")[1].samples, ANNA_2.samples)
    np.testing.assert_array_equal(
        prepared.recordings_of("bert")[0].samples, BERT_1.samples
    )  # too short for a window
    with pytest.raises(NotFoundError, match="known: anna, bert"):
        prepared.recordings_of("carl")


def test_the_second_load_reads_only_the_cache(tmp_path: Path) -> None:
    first = prepare(dataset(), None, tmp_path)
    broken = dataset(reader=FewRecordings((), break_with=DataError("not to be read")))
    assert_equal(prepare(broken, None, tmp_path), first)


def assert_equal(one: Prepared, other: Prepared) -> None:
    np.testing.assert_array_equal(one.windows.x, other.windows.x)
    np.testing.assert_array_equal(one.samples, other.samples)
    assert one.entries == other.entries


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"stride": 10}, {"reader": FewRecordings((ANNA_2,), mark="2")}]
)
def test_a_changed_reader_description_or_source_is_prepared_anew(
    tmp_path: Path, change: dict[str, object]
) -> None:
    prepare(dataset(), None, tmp_path)
    prepare(dataset(**change), None, tmp_path)
    assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 2


def test_a_reader_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    failing = FewRecordings((ANNA_2, ANNA_1), break_with=DataError("truncated"))
    with pytest.raises(DataError, match="truncated"):
        prepare(dataset(reader=failing), None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_removed_after_a_day_and_a_running_one_is_not_touched(
    tmp_path: Path,
) -> None:
    abandoned, running = tmp_path / ".building-few-1", tmp_path / ".building-few-2"
    abandoned.mkdir()
    running.mkdir()
    os.utime(abandoned, (0, 0))
    prepare(dataset(), None, tmp_path)
    assert not abandoned.exists()
    assert running.exists()


def test_a_moved_distribution_is_not_prepared_again(tmp_path: Path) -> None:
    layout = Layout(("few",), ("few*.zip",), (".",), "*.bin")
    archive = tmp_path / "one" / "few.zip"
    archive.parent.mkdir()
    archive.write_bytes(b"content")
    before = layout.locate(archive.parent).fingerprint()
    archive.parent.rename(tmp_path / "two")
    assert layout.locate(tmp_path / "two").fingerprint() == before


@pytest.mark.parametrize("file", ["x.bin", "samples.bin", "index.json", "start.bin"])
@pytest.mark.parametrize("how", ["truncate", "remove"])
def test_a_damaged_entry_is_rebuilt_and_reported(
    tmp_path: Path, file: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare(dataset(), None, tmp_path)
    kept = np.array(first.windows.x)
    (entry,) = tmp_path.iterdir()
    if how == "remove":
        (entry / file).unlink()
    else:
        (entry / file).write_bytes((entry / file).read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        again = prepare(dataset(), None, tmp_path)
    assert "rebuilt" in caplog.text
    np.testing.assert_array_equal(again.windows.x, kept)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (recording("anna", "1", [0] * 12 + [3] * 12), "labels -1 to 2"),
        (replace(ANNA_1, rate_hz=49.0), "at 50.0 Hz"),
        (replace(ANNA_1, channels=INERTIAL6[::-1]), "6 channels"),
        (replace(ANNA_1, samples=np.full((43, 6), np.nan, np.float32)), "NaN"),
        (BERT_1, "no labelled window"),
    ],
)
def test_a_reader_that_breaks_its_description_is_refused(
    tmp_path: Path, bad: Recording, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        prepare(dataset(bad), None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_replay_files_hold_one_person_each(tmp_path: Path) -> None:
    prepared = prepare(dataset(), None, tmp_path / "cache")
    paths = write_replays(prepared, tmp_path / "replay")
    assert [path.name for path in paths] == ["few-anna.npz", "few-bert.npz"]
    recordings, labels = load_recordings(paths[0])
    assert labels == ("sit", "stand")
    for got, expected in zip(recordings, prepared.recordings_of("anna"), strict=True):
        np.testing.assert_array_equal(got.samples, expected.samples)
        np.testing.assert_array_equal(
            cut(got.samples, prepared.dataset.spec), cut(expected.samples, prepared.dataset.spec)
        )
        assert got.session == expected.session


def test_counts_are_remembered(tmp_path: Path) -> None:
    assert counts_of(dataset(), None, tmp_path, silent) == {"recordings": 3}
    emptied = dataset(reader=FewRecordings(()))
    assert counts_of(emptied, None, tmp_path, silent) == {"recordings": 3}


def test_progress_reaches_the_caller(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    prepare(dataset(), None, tmp_path, lambda *news: told.append(news))
    assert told == [("reading", 1, 3), ("reading", 2, 3), ("reading", 3, 3)]
