"""EMG gestures: MYO bracelet with eight electrodes, 36 people, two series each, 1000 Hz (UCI 481).

Rows are taken as consecutive samples at 1000 Hz; the time column skips a few milliseconds in 3 to 5 % of the rows.
Class 0 (unmarked) is no label; class 7 (extended palm), which few people did, is a label of recordings only.
A last row without its class, as one file of the official distribution has, is dropped and logged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import DataError
from wearfleet_protos.labels import EMG6
from wearfleet_protos.recording import Channel, Recording

from wearfleet_cloud.data.dataset import Counts, Dataset, Download, Progress
from wearfleet_cloud.data.file_reader import FileReader
from wearfleet_cloud.data.layout import Layout, Source, members
from wearfleet_cloud.data.number_table import parse_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EMG"]

_log = logging.getLogger(__name__)

_CHANNELS: Final = tuple(Channel(f"emg_{number}", "V") for number in range(1, 9))
_COLUMNS: Final = 10
_FILES: Final = re.compile(
    r"(?:^|/)(?P<subject>\d+)/(?P<series>\d)_raw_data_"
    r"(?P<hour>\d\d)-(?P<minute>\d\d)_(?P<day>\d\d)\.(?P<month>\d\d)\.(?P<year>\d\d)\.txt$"
)


@dataclass(frozen=True, slots=True)
class _Series:
    """One file: who, when, (T, 8) volts, (T,) class 0 to 7."""

    subject: str
    session: str
    samples: NDArray[np.float32]
    classes: NDArray[np.int16]


def _series(source: Source, progress: Progress) -> Iterator[_Series]:
    found = False
    for match, text in members(source, _FILES, progress):
        found = True
        yield _parse(match, text)
    if not found:
        raise DataError(
            f"{source.path}: expected <subject>/<series>_raw_data_HH-MM_DD.MM.YY.txt files, got none"
        )


def _parse(match: re.Match[str], text: bytes) -> _Series:
    name = match.group(0).lstrip("/")
    header, _, body = text.partition(b"\n")
    if header.split()[:1] != [b"time"]:
        raise DataError(f"{name}: expected the header 'time channel1 ... class', got {header[:60]!r}")
    body = body.rstrip()
    head, _, last = body.rpartition(b"\n")
    if head and len(last.split()) == _COLUMNS - 1:
        _log.warning("%s: the last row has no class and is dropped", name)
        body = head
    rows = parse_table(body, _COLUMNS, name)
    classes = rows[:, -1].astype(np.int16)
    if classes.min() < 0 or classes.max() > len(EMG6) + 1:
        raise DataError(f"{name}: expected classes 0 to 7, got {classes.min()} to {classes.max()}")
    return _Series(
        subject=f"{int(match['subject']):02d}",
        session="20{year}-{month}-{day}T{hour}:{minute}-{series}".format(**match.groupdict()),
        samples=rows[:, 1:-1].astype(np.float32),
        classes=classes,
    )


def _recordings(source: Source, progress: Progress) -> Iterator[Recording]:
    for series in _series(source, progress):
        yield Recording(
            samples=series.samples,
            labels=series.classes - np.int16(1),
            rate_hz=1000.0,
            channels=_CHANNELS,
            subject=series.subject,
            position="forearm",
            device="myo bracelet",
            session=series.session,
        )


def _counts(source: Source, progress: Progress) -> Counts:
    classes = np.zeros(len(EMG6) + 2, np.int64)
    series_of: dict[str, int] = {}
    for series in _series(source, progress):
        classes += np.bincount(series.classes, minlength=len(classes))
        series_of[series.subject] = series_of.get(series.subject, 0) + 1
    return {
        "files": sum(series_of.values()),
        "subjects": len(series_of),
        "subjects_with_both_series": sum(number == 2 for number in series_of.values()),
        "rows": int(classes.sum()),
        "rows_by_class": {str(k): int(n) for k, n in enumerate(classes)},
    }


EMG: Final = Dataset(
    name="emg",
    title="EMG data for gestures",
    citation="S. Lobov, N. Krilova, I. Kastalskiy, V. Kazantsev, V. A. Makarov, Latent Factors Limiting the "
    "Performance of sEMG-Interfaces, Sensors 18(4):1122, 2018, doi:10.3390/s18041122",
    license="UCI page understood to say CC BY 4.0",
    channels=_CHANNELS,
    label_names=EMG6,
    other_labels=("extended palm",),
    rate_hz=1000.0,
    window=200,
    stride=100,
    reader=FileReader(
        Layout(
            folders=("emg", "emg-gestures"),
            archives=("EMG_data_for_gestures*.tar.xz", "emg*data*for*gestures.zip"),
            unpacked=("EMG_data_for_gestures-master", "."),
            probe="[0-9][0-9]/[12]_raw_data_*.txt",
        ),
        _recordings,
        _counts,
    ),
    domain_groups=tuple(
        tuple(f"{subject:02d}" for subject in range(first, first + 9)) for first in range(1, 37, 9)
    ),
    download=Download(
        "https://archive.ics.uci.edu/static/public/481/emg+data+for+gestures.zip",
        "emg+data+for+gestures.zip",
        "",
        100 << 20,
    ),
    notes="windows lie inside stretches of one gesture; unmarked samples have no label",
)
