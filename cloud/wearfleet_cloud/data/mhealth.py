"""MHEALTH: chest, left ankle and right lower arm, 10 people, 12 activities, 50 Hz (UCI 319).

Files ``mHealth_subject1.log`` ... ``mHealth_subject10.log`` of 24 columns: acceleration of the chest, two ECG leads,
then acceleration, angular velocity and magnetic field of ankle and arm, and the activity (0: none). Units are those of
the authors' README; that the angular velocities really are degrees a second could not be verified.

No official archive was at hand: this reader was tested on small synthetic files of this layout only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import DataError
from wearfleet_protos.labels import MHEALTH12
from wearfleet_protos.recording import Channel, Recording
from wearfleet_protos.windowing import convert_units

from wearfleet_cloud.data.dataset import Counts, Dataset, Download, Progress
from wearfleet_cloud.data.file_reader import FileReader
from wearfleet_cloud.data.layout import Layout, Source, members
from wearfleet_cloud.data.number_table import parse_table
from wearfleet_cloud.data.sliced import ChannelGroup, SlicedReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MHEALTH"]

_SENSORS: Final = (("acc", "m/s^2"), ("gyro", "rad/s"), ("mag", "local field"))
_LIMBS: Final = ("ankle", "arm")
_CHANNELS: Final = (
    *(Channel(f"chest_acc_{axis}", "m/s^2") for axis in "xyz"),
    Channel("chest_ecg_1", "V"),
    Channel("chest_ecg_2", "V"),
    *(
        Channel(f"{limb}_{sensor}_{axis}", unit)
        for limb in _LIMBS
        for sensor, unit in _SENSORS
        for axis in "xyz"
    ),
)
_STORED: Final = {"rad/s": "deg/s", "V": "mV"}
_MEASURED: Final = tuple(Channel(c.name, _STORED.get(c.unit, c.unit)) for c in _CHANNELS)
_FILES: Final = re.compile(r"(?:^|/)mHealth_subject(?P<subject>\d+)\.log$")


@dataclass(frozen=True, slots=True)
class _Subject:
    """One file: who, (T, 23) samples in the stored units, (T,) activity 0 to 12."""

    name: str
    samples: NDArray[np.float32]
    activities: NDArray[np.int16]


def _subjects(source: Source, progress: Progress) -> Iterator[_Subject]:
    found = False
    for match, text in members(source, _FILES, progress):
        found = True
        name = match.group(0).lstrip("/")
        rows = parse_table(text, len(_CHANNELS) + 1, name)
        if not np.isin(rows[:, -1], range(len(MHEALTH12) + 1)).all():
            raise DataError(f"{name}: expected activities 0 to {len(MHEALTH12)} in the last column")
        yield _Subject(
            f"{int(match['subject']):02d}", rows[:, :-1].astype(np.float32), rows[:, -1].astype(np.int16)
        )
    if not found:
        raise DataError(f"{source.path}: expected mHealth_subject1.log to mHealth_subject10.log, got none")


def _recordings(source: Source, progress: Progress) -> Iterator[Recording]:
    for subject in _subjects(source, progress):
        yield Recording(
            samples=convert_units(subject.samples, _MEASURED, _CHANNELS),
            labels=subject.activities - np.int16(1),
            rate_hz=50.0,
            channels=_CHANNELS,
            subject=subject.name,
            position="whole body",
            device="shimmer 2",
            session="session",
        )


def _counts(source: Source, progress: Progress) -> Counts:
    rows = np.zeros(len(MHEALTH12) + 1, np.int64)
    files = 0
    for subject in _subjects(source, progress):
        files += 1
        rows += np.bincount(subject.activities, minlength=len(rows))
    return {
        "files": files,
        "rows": int(rows.sum()),
        "rows_by_activity": {str(activity): int(number) for activity, number in enumerate(rows)},
    }


_WHOLE_BODY: Final = Dataset(
    name="mhealth",
    title="MHEALTH: mobile health",
    citation="O. Banos, R. Garcia, J. A. Holgado-Terriza, M. Damas, H. Pomares, I. Rojas, A. Saez, C. Villalonga, "
    "mHealthDroid: a novel framework for agile development of mobile health applications, IWAAL 2014",
    license="UCI page understood to say CC BY 4.0",
    channels=_CHANNELS,
    label_names=MHEALTH12,
    rate_hz=50.0,
    window=128,
    stride=64,
    reader=FileReader(
        Layout(
            folders=("mhealth",),
            archives=("mhealth*.zip", "MHEALTHDATASET*.zip"),
            unpacked=("MHEALTHDATASET", "."),
            probe="mHealth_subject*.log",
        ),
        _recordings,
        _counts,
    ),
    group_size=2,
    download=Download(
        "https://archive.ics.uci.edu/static/public/319/mhealth+dataset.zip",
        "mhealth+dataset.zip",
        "",
        300 << 20,
    ),
    notes="reader tested on synthetic files of the official layout only; the chest has no gyroscope",
)


def _one_limb_a_recording() -> Dataset:
    """Nine channels, one recording for each of ankle and arm; the chest's differ and are left out."""
    groups = tuple(
        ChannelGroup(limb, tuple(range(5 + 9 * number, 14 + 9 * number)))
        for number, limb in enumerate(_LIMBS)
    )
    channels = tuple(Channel(f"{sensor}_{axis}", unit) for sensor, unit in _SENSORS for axis in "xyz")
    return replace(
        _WHOLE_BODY, channels=channels, reader=SlicedReader(_WHOLE_BODY.reader, channels, groups, "position")
    )


MHEALTH: Final = replace(_WHOLE_BODY, views={"cross-position": _one_limb_a_recording()})
