"""PAMAP2: inertial units at hand, chest and ankle, 9 people, 12 activities of the protocol, 100 Hz (UCI 231).

Files ``Protocol/subject101.dat`` ... ``subject109.dat`` of 54 columns: time in s, activity, heart rate, then for each
unit temperature, acceleration (16 g range), acceleration (6 g range, saturates, not used), angular velocity, magnetic
field and orientation (invalid in this distribution, not used). Packets lost on the radio link are NaN.

Gaps of up to a quarter of a second are bridged by linear interpolation; at longer ones, and where the time stamps do
not go on by 10 ms, a new recording begins. The optional activities of the folder ``Optional`` are not read.

No official archive was at hand: this reader was tested on small synthetic files of this layout only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import DataError
from wearfleet_protos.labels import PAMAP2_12, UNLABELLED
from wearfleet_protos.recording import Channel, Recording

from wearfleet_cloud.data.dataset import Counts, Dataset, Download, Progress
from wearfleet_cloud.data.file_reader import FileReader
from wearfleet_cloud.data.gaps import bridge, stretches
from wearfleet_cloud.data.layout import Layout, Source, members
from wearfleet_cloud.data.number_table import parse_table
from wearfleet_cloud.data.sliced import ChannelGroup, SlicedReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PAMAP2", "PAMAP2_LAYOUT", "Subject", "subjects_of"]

_RATE_HZ: Final = 100.0
_MAX_GAP: Final = 25  # samples: a quarter of a second
_COLUMNS: Final = 54
_PLACES: Final = ("hand", "chest", "ankle")
_SENSORS: Final = (
    ("acc", "m/s^2", 1),
    ("gyro", "rad/s", 7),
    ("mag", "uT", 10),
)  # name, unit, column in the unit
_UNIT_COLUMNS: Final = 17
_CHANNELS: Final = tuple(
    Channel(f"{place}_{sensor}_{axis}", unit)
    for place in _PLACES
    for sensor, unit, _ in _SENSORS
    for axis in "xyz"
)
_USED: Final = tuple(
    3 + _UNIT_COLUMNS * place + first + axis
    for place in range(len(_PLACES))
    for _, _, first in _SENSORS
    for axis in range(3)
)
_ACTIVITIES: Final = (1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 17, 24)  # in the order of the labels; 0: none
_FILES: Final = re.compile(r"(?:^|/)Protocol/subject(?P<subject>10\d)\.dat$")


@dataclass(frozen=True, slots=True)
class Subject:
    """One file: who, (T,) seconds, (T, 27) samples with NaN where lost, (T,) class or -1."""

    name: str
    time: NDArray[np.float64]
    samples: NDArray[np.float64]
    labels: NDArray[np.int16]

    def pieces(self) -> list[slice]:
        """Stretches in which the time stamps go on by 10 ms."""
        jumps = (np.flatnonzero(np.abs(np.diff(self.time) * _RATE_HZ - 1.0) >= 0.5) + 1).tolist()
        return [slice(a, b) for a, b in pairwise([0, *jumps, len(self.time)])]


def subjects_of(source: Source, progress: Progress) -> Iterator[Subject]:
    """Every file of the protocol, as measured.

    Raises:
        DataError: none is there, or one is not as documented.
    """
    found = False
    for match, text in members(source, _FILES, progress):
        found = True
        yield _parse(match, text)
    if not found:
        raise DataError(f"{source.path}: expected Protocol/subject101.dat to subject109.dat, got none")


def _parse(match: re.Match[str], text: bytes) -> Subject:
    name = match.group(0).lstrip("/")
    rows = parse_table(text, _COLUMNS, name, missing=True)
    time, activity = rows[:, 0], rows[:, 1]
    if np.isnan(rows[:, :2]).any() or (np.diff(time) <= 0).any():
        raise DataError(f"{name}: expected a time that grows and an activity in every row")
    unknown = sorted(set(activity.tolist()) - {0.0, *map(float, _ACTIVITIES)})
    if unknown:
        raise DataError(f"{name}: expected activities 0 or {_ACTIVITIES}, got {unknown}")
    classes = np.full(max(_ACTIVITIES) + 1, UNLABELLED, np.int16)
    classes[list(_ACTIVITIES)] = np.arange(len(_ACTIVITIES))
    return Subject(match["subject"], time, rows[:, _USED], classes[activity.astype(np.int64)])


def _recordings(source: Source, progress: Progress) -> Iterator[Recording]:
    for subject in subjects_of(source, progress):
        number = 0
        for piece in subject.pieces():
            samples = bridge(subject.samples[piece], _MAX_GAP)
            for stretch in stretches(np.all(np.isfinite(samples), axis=1)):
                yield Recording(
                    samples=samples[stretch].astype(np.float32),
                    labels=subject.labels[piece][stretch],
                    rate_hz=_RATE_HZ,
                    channels=_CHANNELS,
                    subject=subject.name,
                    position="whole body",
                    device="colibri",
                    session=f"{number:04d}",
                )
                number += 1


def _counts(source: Source, progress: Progress) -> Counts:
    rows_by_activity: dict[str, int] = {}
    lost = dict.fromkeys(_PLACES, 0)
    files = rows = 0
    for subject in subjects_of(source, progress):
        files, rows = files + 1, rows + len(subject.labels)
        for label, found in zip(*np.unique(subject.labels, return_counts=True), strict=True):
            name = "none" if label == UNLABELLED else PAMAP2_12[label]
            rows_by_activity[name] = rows_by_activity.get(name, 0) + int(found)
        for number, place in enumerate(_PLACES):
            lost[place] += int(np.isnan(subject.samples[:, 9 * number : 9 * number + 9]).any(axis=1).sum())
    return {
        "files": files,
        "rows": rows,
        "rows_by_activity": rows_by_activity,
        "rows_with_lost_values": lost,
    }


def _groups() -> tuple[tuple[str, ...], ...]:
    """The benchmark's person groups; it stores subject 101 as 0 (specs/ood.md 1.2)."""
    stored = ((3, 2, 8), (1, 5), (0, 7), (4, 6))
    return tuple(tuple(f"{subject + 101}" for subject in group) for group in stored)


PAMAP2_LAYOUT: Final = Layout(
    folders=("pamap2",),
    archives=("pamap2*physical*activity*monitoring.zip", "PAMAP2*.zip"),
    unpacked=("PAMAP2_Dataset", "."),
    probe="Protocol/subject10*.dat",
)

_WHOLE_BODY: Final = Dataset(
    name="pamap2",
    title="PAMAP2: physical activity monitoring",
    citation="A. Reiss, D. Stricker, Introducing a New Benchmarked Dataset for Activity Monitoring, 16th International "
    "Symposium on Wearable Computers (ISWC), 2012",
    license="UCI page understood to say CC BY 4.0",
    channels=_CHANNELS,
    label_names=PAMAP2_12,
    rate_hz=_RATE_HZ,
    window=200,
    stride=100,
    reader=FileReader(PAMAP2_LAYOUT, _recordings, _counts),
    domain_groups=_groups(),
    download=Download(
        "https://archive.ics.uci.edu/static/public/231/pamap2+physical+activity+monitoring.zip",
        "pamap2+physical+activity+monitoring.zip",
        "",
        1 << 30,
    ),
    notes="reader tested on synthetic files of the official layout only; protocol activities, 16 g acceleration",
)


def _one_position_a_recording() -> Dataset:
    """Nine channels, one recording for each unit on the body."""
    groups = tuple(
        ChannelGroup(place, tuple(range(9 * number, 9 * number + 9))) for number, place in enumerate(_PLACES)
    )
    channels = tuple(Channel(f"{sensor}_{axis}", unit) for sensor, unit, _ in _SENSORS for axis in "xyz")
    return replace(
        _WHOLE_BODY, channels=channels, reader=SlicedReader(_WHOLE_BODY.reader, channels, groups, "position")
    )


PAMAP2: Final = replace(_WHOLE_BODY, views={"cross-position": _one_position_a_recording()})
