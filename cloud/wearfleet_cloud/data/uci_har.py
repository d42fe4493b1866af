"""UCI-HAR: windows of a smartphone at the waist, 50 Hz, six activities (UCI 240), "Inertial Signals" files.

Total acceleration and angular velocity are read (body_acc is total_acc without gravity and is left out, so that
the channels equal those of the raw recordings). The files hold windows with 50 % overlap, not recordings: windows
that continue each other (second half equal to the next one's first half, same label and wearer) are joined again
into one recording, so that the checks for shared samples see the overlap.

Without ``subject_{train,test}.txt`` beside the signals every wearer is "unknown", and whatever needs persons refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import DataError
from wearfleet_protos.labels import UCI_HAR6
from wearfleet_protos.recording import Channel, Recording
from wearfleet_protos.windowing import convert_units

from wearfleet_cloud.data.dataset import INERTIAL6, UNKNOWN_SUBJECT, Counts, Dataset, Download, Progress
from wearfleet_cloud.data.file_reader import FileReader
from wearfleet_cloud.data.layout import Layout, Source, members
from wearfleet_cloud.data.number_table import parse_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["UCI_HAR"]

_WINDOW: Final = 128
_PARTS: Final = ("train", "test")
_COLUMNS: Final = tuple(f"{sensor}_{axis}" for sensor in ("total_acc", "body_gyro") for axis in "xyz")
_FILES: Final = re.compile(
    r"(?P<full>full-length labels/)?(?P<part>train|test)/(?:Inertial Signals/)?"
    r"(?P<what>y|subject|(?:total_acc|body_gyro)_[xyz])_(?P=part)\.txt$"
)
_MEASURED: Final = tuple(Channel(c.name, "g" if c.unit == "m/s^2" else c.unit) for c in INERTIAL6)


@dataclass(frozen=True, slots=True)
class _Part:
    """One official part: windows (N, 6, 128) as stored, classes (N,), wearers (N,) or None."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    subject: NDArray[np.int64] | None


_Tables = dict[tuple[bool, str, str], "NDArray[np.float64]"]


def _load(source: Source, progress: Progress) -> tuple[dict[str, _Part], _Tables]:
    """The parts, and every table by (from the full-length labels?, part, what)."""
    tables: _Tables = {}
    for match, text in members(source, _FILES, progress):
        width = 1 if match["what"] in {"y", "subject"} else _WINDOW
        tables[bool(match["full"]), match["part"], match["what"]] = parse_table(text, width, match.group(0))
    return {part: _part(tables, part, source) for part in _PARTS}, tables


def _part(tables: _Tables, part: str, source: Source) -> _Part:
    missing = [what for what in ("y", *_COLUMNS) if (False, part, what) not in tables]
    if missing:
        raise DataError(
            f"{source.path}: {part} lacks {', '.join(missing)}; expected the official layout "
            "{train,test}/Inertial Signals/*.txt and y_{train,test}.txt"
        )
    y = tables[False, part, "y"][:, 0].astype(np.int64)
    subject_table = tables.get((False, part, "subject"))
    subject = None if subject_table is None else subject_table[:, 0].astype(np.int64)
    rows = {what: len(tables[False, part, what]) for what in _COLUMNS} | {"y": len(y)}
    if subject is not None:
        rows["subject"] = len(subject)
    if len(set(rows.values())) != 1:
        raise DataError(f"{source.path}: {part} files differ in rows ({rows}); one is truncated")
    if y.min() < 1 or y.max() > len(UCI_HAR6):
        raise DataError(f"{source.path}: y_{part}.txt must hold classes 1 to 6, got {y.min()} to {y.max()}")
    x = np.stack([tables[False, part, column].astype(np.float32) for column in _COLUMNS], axis=1)
    return _Part(x, y, subject)


def _chains(part: _Part) -> list[slice]:
    """Runs of windows that continue each other."""
    half = _WINDOW // 2
    joined = np.all(part.x[:-1, :, half:] == part.x[1:, :, :half], axis=(1, 2)) & (part.y[:-1] == part.y[1:])
    if part.subject is not None:
        joined &= part.subject[:-1] == part.subject[1:]
    edges = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(part.y)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def _recordings(source: Source, progress: Progress) -> Iterator[Recording]:
    parts, _ = _load(source, progress)
    for name, part in parts.items():
        for run in _chains(part):
            windows = part.x[run]
            samples = np.concatenate([windows[0].T, *(window[:, _WINDOW // 2 :].T for window in windows[1:])])
            subject = UNKNOWN_SUBJECT if part.subject is None else f"{part.subject[run.start]:02d}"
            yield Recording(
                samples=convert_units(samples, _MEASURED, INERTIAL6),
                labels=np.full(len(samples), part.y[run.start] - 1, np.int16),
                rate_hz=50.0,
                channels=INERTIAL6,
                subject=subject,
                position="waist",
                device="smartphone",
                session=f"{name}-{run.start:05d}",
            )


def _counts(source: Source, progress: Progress) -> Counts:
    parts, tables = _load(source, progress)
    counts: dict[str, int | dict[str, int]] = {}
    for name, part in parts.items():
        counts[f"{name}_windows"] = len(part.y)
        counts[f"{name}_classes"] = {str(k): int(n) for k, n in enumerate(np.bincount(part.y)) if k}
        counts[f"{name}_users"] = 0 if part.subject is None else len(np.unique(part.subject))
        if (True, name, "y") in tables and (True, name, "subject") in tables:
            counts[f"official_{name}_labels"] = len(tables[True, name, "y"])
            counts[f"official_{name}_users"] = len(np.unique(tables[True, name, "subject"]))
    return counts


UCI_HAR: Final = Dataset(
    name="uci-har",
    title="UCI-HAR: human activity recognition using smartphones, ready-made windows",
    citation="D. Anguita, A. Ghio, L. Oneto, X. Parra, J. L. Reyes-Ortiz, A Public Domain Dataset for Human Activity "
    "Recognition Using Smartphones, ESANN 2013",
    license="authors' README: cite the paper, as is, any commercial use prohibited; UCI page understood to say "
    "CC BY 4.0: treat as non-commercial research use",
    channels=INERTIAL6,
    label_names=UCI_HAR6,
    rate_hz=50.0,
    window=_WINDOW,
    stride=_WINDOW // 2,
    reader=FileReader(
        Layout(
            folders=("uci-har", "uci-har-subset"),
            archives=("UCI_HAR*.tar.xz", "human*activity*recognition*smartphones.zip", "UCI HAR*.zip"),
            unpacked=("UCI HAR Dataset", "."),
            probe="train/Inertial Signals/total_acc_x_train.txt",
        ),
        _recordings,
        _counts,
    ),
    domain_groups=tuple(
        tuple(f"{user:02d}" for user in range(first, first + 6)) for first in range(1, 31, 6)
    ),
    time_domains=5,
    download=Download(
        "https://archive.ics.uci.edu/static/public/240/human+activity+recognition+using+smartphones.zip",
        "human+activity+recognition+using+smartphones.zip",
        "c00b803081a5c797cd5e4b83700a9810b38d53d9d84e01917e090e1fdbc81031",
        200 << 20,
    ),
    notes="filtered by its authors (median, 20 Hz low-pass); without subject files only whole-set use is possible",
)
