"""WESAD: chest strap of 15 people in four affective states, 700 Hz, one pickle a person (UCI 465).

``S2/S2.pkl`` ... ``S17/S17.pkl`` (there is no S1 and no S12): ``signal`` -> ``chest`` -> ACC (three axes), ECG, EMG,
EDA, Temp, Resp, and ``label`` of every sample: 1 to 4 are the states, 0 and 5 to 7 none. The wrist band is not read.
A pickle can run code, so it is read by :mod:`wearfleet_cloud.data.plain_pickle`.

The benchmark's arrays have 200 samples at "33 Hz" (specs/ood.md 1.2); how they were resampled is not published. Here
the 700 Hz signals go through the polyphase low-pass resampler that devices use, 33 for every 700 samples, and each new
sample carries the label of the last original one before it. What is above 16.5 Hz is gone, most of the EMG with it.

No official archive was at hand: this reader was tested on small synthetic files of this layout only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import DataError
from wearfleet_protos.labels import UNLABELLED, WESAD4
from wearfleet_protos.recording import Channel, Recording
from wearfleet_protos.windowing import convert_units, resample

from wearfleet_cloud.data.dataset import Counts, Dataset, Download, Progress
from wearfleet_cloud.data.file_reader import FileReader
from wearfleet_cloud.data.layout import Layout, Source, members
from wearfleet_cloud.data.plain_pickle import PlainPickle

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["WESAD"]

_MEASURED_HZ: Final = 700.0
_RATE_HZ: Final = 33.0
_MAX_BYTES: Final = 2 << 30
_PARTS: Final = (("ACC", 3), ("ECG", 1), ("EMG", 1), ("EDA", 1), ("Temp", 1), ("Resp", 1))
_CHANNELS: Final = (
    *(Channel(f"acc_{axis}", "m/s^2") for axis in "xyz"),
    Channel("ecg", "V"),
    Channel("emg", "V"),
    Channel("eda", "uS"),
    Channel("temperature", "degC"),
    Channel("respiration", "%"),
)
_STORED: Final = {"m/s^2": "g", "V": "mV"}
_MEASURED: Final = tuple(Channel(c.name, _STORED.get(c.unit, c.unit)) for c in _CHANNELS)
_LABELS: Final = 8  # 0 to 7 occur, 1 to 4 are states
_FILES: Final = re.compile(r"(?:^|/)S(?P<subject>\d+)/S(?P=subject)\.pkl$")


@dataclass(frozen=True, slots=True)
class _Subject:
    """One file: who, (T, 8) samples at 700 Hz in the stored units, (T,) label 0 to 7."""

    name: str
    samples: NDArray[np.float32]
    labels: NDArray[np.int64]


def _subjects(source: Source, progress: Progress) -> Iterator[_Subject]:
    found = False
    for match, content in members(source, _FILES, progress, _MAX_BYTES):
        found = True
        name = match.group(0).lstrip("/")
        yield _subject(f"{int(match['subject']):02d}", PlainPickle(content, name), name)
    if not found:
        raise DataError(f"{source.path}: expected S2/S2.pkl to S17/S17.pkl, got none")


def _subject(subject: str, content: PlainPickle, name: str) -> _Subject:
    labels = content.array("label")
    if labels.ndim != 1 or len(labels) == 0 or not np.isin(labels, range(_LABELS)).all():
        raise DataError(f"{name}: expected labels 0 to {_LABELS - 1} of shape (N,), got shape {labels.shape}")
    columns = []
    for part, width in _PARTS:
        values = content.array("signal", "chest", part)
        if values.shape != (len(labels), width) or not np.isfinite(values).all():
            raise DataError(
                f"{name}: expected finite chest {part} ({len(labels)}, {width}), got shape {values.shape}"
            )
        columns.append(values.astype(np.float32))
    return _Subject(subject, np.concatenate(columns, axis=1), labels.astype(np.int64))


def _recordings(source: Source, progress: Progress) -> Iterator[Recording]:
    classes = np.full(_LABELS, UNLABELLED, np.int16)
    classes[1 : len(WESAD4) + 1] = np.arange(len(WESAD4))
    for subject in _subjects(source, progress):
        samples = resample(convert_units(subject.samples, _MEASURED, _CHANNELS), _MEASURED_HZ, _RATE_HZ)
        before = np.arange(len(samples)) * int(_MEASURED_HZ) // int(_RATE_HZ)
        yield Recording(
            samples=samples,
            labels=classes[subject.labels[before]],
            rate_hz=_RATE_HZ,
            channels=_CHANNELS,
            subject=subject.name,
            position="chest",
            device="respiban",
            session="study",
        )


def _counts(source: Source, progress: Progress) -> Counts:
    rows = np.zeros(_LABELS, np.int64)
    files = 0
    for subject in _subjects(source, progress):
        files += 1
        rows += np.bincount(subject.labels, minlength=_LABELS)
    return {
        "files": files,
        "rows": int(rows.sum()),
        "rows_by_label": {str(label): int(number) for label, number in enumerate(rows)},
    }


WESAD: Final = Dataset(
    name="wesad",
    title="WESAD: wearable stress and affect detection (chest)",
    citation="P. Schmidt, A. Reiss, R. Duerichen, C. Marberger, K. Van Laerhoven, Introducing WESAD, a Multimodal "
    "Dataset for Wearable Stress and Affect Detection, ICMI 2018, doi:10.1145/3242969.3242985",
    license="offered by its authors for non-commercial scientific use, as understood; its page was not at hand",
    channels=_CHANNELS,
    label_names=WESAD4,
    rate_hz=_RATE_HZ,
    window=200,
    stride=100,
    reader=FileReader(
        Layout(
            folders=("wesad",),
            archives=("WESAD*.zip", "wesad*.zip"),
            unpacked=("WESAD", "."),
            probe="S[0-9]*/S[0-9]*.pkl",
        ),
        _recordings,
        _counts,
    ),
    domain_groups=(
        ("02", "03", "04", "05"),
        ("06", "07", "08", "09"),
        ("10", "11", "13", "14"),
        ("15", "16", "17"),
    ),
    download=Download("https://uni-siegen.sciebo.de/s/HGdUkoNlW1Ub0Gx/download", "WESAD.zip", "", 4 << 30),
    notes="reader tested on synthetic files of the official layout only; UCI 465 holds a link, not the data; resampled "
    "from 700 to 33 Hz, so little of the EMG is left",
)
