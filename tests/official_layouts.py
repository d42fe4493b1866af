"""Small synthetic distributions in the official layouts of data sets that cannot be had here."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.io

CHEST = (("ACC", 3), ("ECG", 1), ("EMG", 1), ("EDA", 1), ("Temp", 1), ("Resp", 1))
WRIST = (("ACC", 3), ("BVP", 1), ("EDA", 1), ("TEMP", 1))


def zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def pamap2_rows(activities: np.ndarray, seed: int = 0, first_s: float = 8.38) -> np.ndarray:
    """(T, 54) as in a file of the protocol: heart rate in every eleventh row, orientation (1, 0, 0, 0)."""
    count = len(activities)
    rows = np.random.default_rng(seed).normal(size=(count, 54)).round(5)
    rows[:, 0] = first_s + np.arange(count) / 100.0
    rows[:, 1] = activities
    rows[:, 2] = np.where(np.arange(count) % 11 == 0, 104.0, np.nan)
    for unit in (3, 20, 37):
        rows[:, unit] = 30.375
        rows[:, unit + 13 : unit + 17] = [1.0, 0.0, 0.0, 0.0]
    return rows


def pamap2_text(rows: np.ndarray) -> bytes:
    """Blank-separated, two decimals of time, whole activities, ``NaN`` where lost."""
    lines = []
    for row in rows:
        values = ["NaN" if np.isnan(v) else f"{v:.6g}" for v in row[2:]]
        lines.append(" ".join([f"{row[0]:.2f}", str(int(row[1])), *values]))
    return ("\n".join(lines) + "\n").encode()


def write_pamap2(root: Path, subjects: Mapping[int, np.ndarray]) -> None:
    """The archive as UCI offers it: a zip with a readme and a zip, which holds Protocol and Optional."""
    folder = root / "pamap2"
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"PAMAP2_Dataset/Protocol/subject{n}.dat": pamap2_text(rows) for n, rows in subjects.items()}
    files["PAMAP2_Dataset/Optional/subject101.dat"] = pamap2_text(pamap2_rows(np.full(3, 20)))
    outer = {"readme.pdf": b"%PDF", "PAMAP2_Dataset.zip": zipped(files)}
    (folder / "pamap2+physical+activity+monitoring.zip").write_bytes(zipped(outer))


def write_dsads(root: Path, subjects: range, segments: int) -> None:
    """The archive as UCI offers it, every segment alike: 125 rows of 45 columns."""
    text = ("\n".join([",".join(["1.5"] * 45)] * 125) + "\n").encode()
    names = (
        f"data/a{activity:02d}/p{subject}/s{segment:02d}.txt"
        for activity in range(1, 20)
        for subject in subjects
        for segment in range(1, segments + 1)
    )
    folder = root / "dsads"
    folder.mkdir(parents=True)
    (folder / "daily+and+sports+activities.zip").write_bytes(zipped(dict.fromkeys(names, text)))


def write_usc_had(root: Path, subjects: Mapping[int, Mapping[int, np.ndarray]]) -> None:
    """Activity -> (T, 6) readings in g and degrees a second, one trial each."""
    for subject, activities in subjects.items():
        for activity, readings in activities.items():
            path = root / "USC-HAD" / f"Subject{subject}" / f"a{activity}t1.mat"
            path.parent.mkdir(parents=True, exist_ok=True)
            scipy.io.savemat(path, {"sensor_readings": readings, "activity_number": str(activity)})


def mhealth_text(rows: np.ndarray) -> bytes:
    """Tab-separated; the last of 24 columns is the activity."""
    lines = ("\t".join([*(f"{v:.5g}" for v in row[:-1]), str(int(row[-1]))]) for row in rows)
    return ("\n".join(lines) + "\n").encode()


def write_mhealth(root: Path, subjects: Mapping[int, np.ndarray]) -> None:
    folder = root / "mhealth"
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"MHEALTHDATASET/mHealth_subject{n}.log": mhealth_text(rows) for n, rows in subjects.items()}
    (folder / "mhealth+dataset.zip").write_bytes(zipped(files | {"MHEALTHDATASET/README.txt": b"units"}))


def python2_pickle(value: object, protocol: int) -> bytes:
    """What Python 2 wrote for dictionaries, text, numbers and arrays: its strings are bytes without a coding."""
    write = {0: _text_form, 2: _binary_form}[protocol]
    return (b"\x80\x02" if protocol == 2 else b"") + write(value) + b"."


def _array_state(array: np.ndarray) -> tuple[str, str, bytes]:
    kind = array.dtype.str
    return kind[1:], kind[0], array.tobytes()


def _text_form(value: object) -> bytes:
    if isinstance(value, dict):
        return b"(d" + b"".join(_text_form(k) + _text_form(v) + b"s" for k, v in value.items())
    if isinstance(value, str):
        return b"S" + repr(value).encode() + b"\n"
    if isinstance(value, int):
        return b"I%d\n" % value
    assert isinstance(value, np.ndarray)
    kind, order, raw = _array_state(value)
    shape = b"(" + b"".join(b"I%d\n" % n for n in value.shape) + b"t"
    state = b"(I3\nS'%s'\nNNNI-1\nI-1\nI0\ntb" % order.encode()
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        + (b"(I1\n" + shape + b"cnumpy\ndtype\n(S'%s'\nI0\nI1\ntR" % kind.encode() + state)
        + (b"I00\nS" + repr(raw)[1:].encode() + b"\ntb")
    )


def _binary_form(value: object) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_binary_form(k) + _binary_form(v) for k, v in value.items()) + b"u"
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    assert isinstance(value, np.ndarray)
    kind, order, raw = _array_state(value)
    shape = b"(" + b"".join(map(_binary_form, value.shape)) + b"t"
    number_type = b"cnumpy\ndtype\n" + _binary_form(kind) + b"K\x00K\x01\x87R"
    state = b"(K\x03" + _binary_form(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + (b"(K\x01" + shape + number_type + state)
        + (b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb")
    )


def wesad_content(labels: np.ndarray, subject: str, seed: int = 0) -> dict[str, object]:
    """What a subject's pickle holds; chest at 700 Hz in the stored units, wrist at its own rates."""
    random = np.random.default_rng(seed)
    chest = {part: random.normal(size=(len(labels), width)) for part, width in CHEST}
    chest["Temp"] = chest["Temp"].astype(np.float32)
    wrist = {part: random.normal(size=(len(labels) // 20, width)) for part, width in WRIST}
    return {
        "signal": {"chest": chest, "wrist": wrist},
        "label": labels.astype(np.int32),
        "subject": subject,
    }


def write_wesad(root: Path, subjects: Mapping[int, dict[str, object]], protocol: int = 2) -> None:
    folder = root / "wesad"
    folder.mkdir(parents=True, exist_ok=True)
    files = {"WESAD/wesad_readme.pdf": b"%PDF"}
    for number, content in subjects.items():
        name = f"S{number}"
        files[f"WESAD/{name}/{name}.pkl"] = python2_pickle(content, protocol)
        files[f"WESAD/{name}/{name}_quest.csv"] = b"# Subj;S2\n"
        files[f"WESAD/{name}/{name}_E4_Data.zip"] = zipped({"ACC.csv": b"1\n"})
    (folder / "WESAD.zip").write_bytes(zipped(files))
