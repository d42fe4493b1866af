"""Each reader on a tiny distribution of the official layout: units, labels, order, and what it refuses."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from wearfleet_cloud.data import DATASETS
from wearfleet_cloud.data.dataset import UNKNOWN_SUBJECT, silent
from wearfleet_cloud.data.wisdm import align
from wearfleet_protos.errors import DataError
from wearfleet_protos.recording import Recording

G = 9.80665


def write(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(name: str, root: Path) -> list[Recording]:
    return list(DATASETS[name].reader.read(root, silent))


def hapt_files() -> dict[str, str | bytes]:
    return {
        "HAPT Data Set/RawData/acc_exp01_user07.txt": "1 0 0\n" * 10,
        "HAPT Data Set/RawData/gyro_exp01_user07.txt": "0 0.5 0\n" * 10,
        "HAPT Data Set/RawData/labels.txt": "1 7 5 2 4\n1 7 12 6 10\n",
    }


def test_hapt_labels_are_one_based_and_inclusive_and_acceleration_is_in_g(tmp_path: Path) -> None:
    write(tmp_path, hapt_files())
    (recording,) = read("hapt", tmp_path)
    assert recording.labels.tolist() == [-1, 4, 4, 4, -1, 11, 11, 11, 11, 11]
    np.testing.assert_allclose(recording.samples[3], [G, 0, 0, 0, 0.5, 0], rtol=1e-6)
    assert (recording.subject, recording.session, recording.position) == ("07", "experiment-01", "waist")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("gyro_exp01_user07.txt", "0 0.5 0\n" * 9, "10 acc rows but 9 gyro rows"),
        ("gyro_exp01_user07.txt", "0 0.5\n" * 10, "expected 3 numbers"),
        ("gyro_exp02_user07.txt", "0 0.5 0\n", "1 acc and 2 gyro"),
        ("labels.txt", "1 7 5 2 11\n", "does not fit its recording of 10"),
        ("labels.txt", "1 8 5 2 4\n", "does not fit its recording of 0"),
        ("labels.txt", "1 7 13 2 4\n", "12 activities"),
    ],
)
def test_hapt_refuses_files_that_do_not_fit_together(
    tmp_path: Path, name: str, content: str, complaint: str
) -> None:
    write(tmp_path, hapt_files() | {f"HAPT Data Set/RawData/{name}": content})
    with pytest.raises(DataError, match=complaint):
        read("hapt", tmp_path)


def uci_har_files(rows: np.ndarray, labels: list[int], part: str) -> dict[str, str | bytes]:
    text = "\n".join(" ".join(str(v) for v in row) for row in rows)
    names = [f"{sensor}_{axis}" for sensor in ("total_acc", "body_gyro") for axis in "xyz"]
    files: dict[str, str | bytes] = {
        f"UCI HAR Dataset/{part}/Inertial Signals/{name}_{part}.txt": text for name in names
    }
    return files | {f"UCI HAR Dataset/{part}/y_{part}.txt": "\n".join(str(k) for k in labels)}


def test_uci_har_windows_that_continue_each_other_become_one_recording(tmp_path: Path) -> None:
    signal = np.arange(256.0)
    rows = np.stack([signal[0:128], signal[64:192], signal[128:256], signal[0:128] + 1000])
    write(tmp_path, uci_har_files(rows, [1, 1, 1, 2], "train") | uci_har_files(rows[:1], [6], "test"))
    first, second, third = read("uci-har", tmp_path)
    np.testing.assert_allclose(first.samples[:, 0], signal * G, rtol=1e-6)
    np.testing.assert_allclose(first.samples[:, 3], signal, rtol=1e-6)
    assert [len(r.samples) for r in (second, third)] == [128, 128]
    assert [set(r.labels.tolist()) for r in (first, second, third)] == [{0}, {1}, {5}]
    assert first.subject == UNKNOWN_SUBJECT


def test_uci_har_never_joins_windows_of_two_people_and_reads_their_numbers(tmp_path: Path) -> None:
    signal = np.arange(192.0)
    rows = np.stack([signal[0:128], signal[64:192]])
    files = uci_har_files(rows, [1, 1], "train") | uci_har_files(rows, [1, 1], "test")
    subjects = {
        "UCI HAR Dataset/train/subject_train.txt": "1\n3\n",
        "UCI HAR Dataset/test/subject_test.txt": "2\n2\n",
    }
    write(tmp_path, files | subjects)
    assert [r.subject for r in read("uci-har", tmp_path)] == ["01", "03", "02"]


def test_uci_har_refuses_labels_that_do_not_line_up(tmp_path: Path) -> None:
    rows = np.zeros((2, 128))
    write(tmp_path, uci_har_files(rows, [1, 1, 1], "train") | uci_har_files(rows, [1, 1], "test"))
    with pytest.raises(DataError, match="differ in rows"):
        read("uci-har", tmp_path)


def mat(**fields: object) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, fields)
    return buffer.getvalue()


def test_usc_had_takes_the_label_from_the_file_name_and_converts_units(tmp_path: Path) -> None:
    readings = np.tile([1.0, 0, 0, 180.0, 0, 0], (5, 1))
    write(tmp_path, {"USC-HAD/Subject14/a3t2.mat": mat(sensor_readings=readings, activity_number="2")})
    write(
        tmp_path,
        {"USC-HAD/Subject2/a1t1.mat": mat(sensor_readings=readings, activity_numbr="1", comments="x")},
    )
    other, odd = read("usc-had", tmp_path)
    assert (odd.subject, odd.session, set(odd.labels.tolist())) == ("14", "trial-2", {2})
    assert other.subject == "02"
    np.testing.assert_allclose(odd.samples[0], [G, 0, 0, np.pi, 0, 0], rtol=1e-6)
    counts = DATASETS["usc-had"].reader.counts(tmp_path, silent)
    assert counts["activity_field_disagrees"] == counts["misspelled_activity_field"] == 1
    assert counts["extra_comments_field"] == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"not matlab at all", "not a readable MATLAB file"),
        (mat(other=1), "sensor_readings"),
        (mat(sensor_readings=np.zeros((4, 5))), "N x 6"),
        (mat(sensor_readings=np.full((4, 6), np.nan)), "finite"),
        (mat(sensor_readings=np.zeros((4, 6)))[:-40], "MATLAB"),
    ],
)
def test_usc_had_refuses_a_malformed_file(tmp_path: Path, content: bytes, complaint: str) -> None:
    write(tmp_path, {"USC-HAD/Subject1/a1t1.mat": content})
    with pytest.raises(DataError, match=complaint):
        read("usc-had", tmp_path)


def segment(value: float, rows: int = 125) -> str:
    return "\n".join(",".join([str(value)] * 45) for _ in range(rows))


def test_dsads_every_segment_is_a_recording_of_its_own_in_time_order(tmp_path: Path) -> None:
    write(tmp_path, {f"data/a02/p1/s0{n}.txt": segment(n) for n in (4, 1, 2)})
    recordings = read("dsads", tmp_path)
    assert [r.session for r in recordings] == ["segment-01", "segment-02", "segment-04"]
    assert [float(r.samples[0, 44]) for r in recordings] == [1.0, 2.0, 4.0]
    assert {r.samples.shape for r in recordings} == {(125, 45)}
    assert set(recordings[0].labels.tolist()) == {1}


def test_dsads_refuses_a_short_segment(tmp_path: Path) -> None:
    write(tmp_path, {"data/a01/p1/s01.txt": segment(1.0, rows=124)})
    with pytest.raises(DataError, match="got 124 rows"):
        read("dsads", tmp_path)


def emg_text(classes: list[int]) -> str:
    rows = ["time\tchannel1\tc2\tc3\tc4\tc5\tc6\tc7\tc8\tclass"]
    rows += [f"{t}" + "\t1e-05" * 8 + f"\t{k}" for t, k in enumerate(classes)]
    return "\r\n".join(rows) + "\r\n"


def test_emg_unmarked_rows_have_no_label_and_the_palm_is_an_extra_one(tmp_path: Path) -> None:
    write(tmp_path, {"EMG_data_for_gestures-master/03/2_raw_data_09-34_11.04.16.txt": emg_text([0, 1, 6, 7])})
    (recording,) = read("emg", tmp_path)
    assert recording.labels.tolist() == [-1, 0, 5, 6]
    assert (recording.subject, recording.session) == ("03", "2016-04-11T09:34-2")
    np.testing.assert_allclose(recording.samples, 1e-5, rtol=1e-6)


def test_emg_drops_a_last_row_without_class_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = emg_text([0, 1, 2]).rstrip().rpartition("\t")[0]
    write(tmp_path, {"EMG_data_for_gestures-master/34/1_raw_data_10-51_07.04.16.txt": text})
    with caplog.at_level(logging.WARNING):
        (recording,) = read("emg", tmp_path)
    assert recording.labels.tolist() == [-1, 0]
    assert "has no class" in caplog.text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (emg_text([0, 8]), "classes 0 to 7"),
        ("1 2 3\n", "header"),
        (emg_text([0, 1]).replace("\t1\r", "\tx\r"), "numbers"),
    ],
)
def test_emg_refuses_a_malformed_file(tmp_path: Path, text: str, complaint: str) -> None:
    write(tmp_path, {"EMG_data_for_gestures-master/01/1_raw_data_10-51_07.04.16.txt": text})
    with pytest.raises(DataError, match=complaint):
        read("emg", tmp_path)


def wisdm_stream(letter: str, start: int, count: int, value: str) -> str:
    return "".join(f"1600,{letter},{start + i * 50_000_000},{value},0,0;\n" for i in range(count))


def test_wisdm_streams_meet_on_one_grid_and_time_orders_the_sessions(tmp_path: Path) -> None:
    accel = wisdm_stream("A", 10**12, 40, "2.5E-1") + wisdm_stream("S", 10**11, 40, "9")
    gyro = wisdm_stream("A", 10**12 + 20_000_000, 40, "-1") + wisdm_stream("S", 10**11, 40, "3")
    for device in ("phone", "watch"):
        write(tmp_path, {f"wisdm-dataset/raw/{device}/accel/data_1600_accel_{device}.txt": accel})
        write(tmp_path, {f"wisdm-dataset/raw/{device}/gyro/data_1600_gyro_{device}.txt": gyro})
    recordings = read("wisdm-51", tmp_path)
    assert [(r.position, r.session) for r in recordings] == [
        ("phone", "00-000"),
        ("phone", "01-000"),
        ("watch", "00-000"),
        ("watch", "01-000"),
    ]
    folding, walking = recordings[:2]
    assert (set(folding.labels.tolist()), set(walking.labels.tolist())) == ({17}, {0})
    assert len(folding.samples) == 40
    assert len(walking.samples) == 39  # the gyroscope began 20 ms later: one grid point less is shared
    np.testing.assert_allclose(walking.samples[:, [0, 3]], [[0.25, -1.0]] * 39)


def test_wisdm_alignment_interpolates_and_splits_at_gaps() -> None:
    time = np.concatenate((np.arange(0, 2, 0.05), np.arange(5, 7, 0.05)))
    ramp = np.column_stack((time, time, -time, time))
    shifted = np.column_stack((time + 0.01, time, time, time))
    pieces = align(ramp, shifted)
    assert len(pieces) == 2
    np.testing.assert_allclose(pieces[0][:, 0], 0.01 + np.arange(len(pieces[0])) * 0.05, atol=1e-6)
    assert align(ramp, shifted + np.array([100, 0, 0, 0])) == []


@pytest.mark.parametrize(
    "line", ["1600,N,1,0,0,0;\n", "1601,A,1,0,0,0;\n", "1600,A,1,0,0;\n", "1600,A,1,0,0,oops;\n"]
)
def test_wisdm_refuses_a_malformed_line(tmp_path: Path, line: str) -> None:
    text = wisdm_stream("A", 0, 3, "1") + line
    for sensor in ("accel", "gyro"):
        write(tmp_path, {f"wisdm-dataset/raw/phone/{sensor}/data_1600_{sensor}_phone.txt": text})
    with pytest.raises(DataError, match="data_1600_accel_phone"):
        read("wisdm-51", tmp_path)


@pytest.mark.parametrize("name", ["hapt", "uci-har", "usc-had", "dsads", "emg", "wisdm-51"])
def test_a_root_without_the_set_names_what_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="expected an archive named"):
        read(name, tmp_path)
