"""DSADS: five inertial units on the body, 8 people, 19 activities, 25 Hz, one text file per five seconds (UCI 256).

Every segment file is one recording and one window: 125 samples, stride 125, 45 channels. Segments of most activities
continue each other (they were cut from five minutes), but those of the stairs do not, nor do some others: the step
over the border of two files is then several times the step inside. So they are not joined.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import DataError
from wearfleet_protos.labels import DSADS19
from wearfleet_protos.recording import Channel, Recording

from wearfleet_cloud.data.dataset import Counts, Dataset, Download, Progress
from wearfleet_cloud.data.file_reader import FileReader
from wearfleet_cloud.data.layout import Layout, Source, members
from wearfleet_cloud.data.number_table import parse_table
from wearfleet_cloud.data.sliced import ChannelGroup, SlicedReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DSADS"]

_SEGMENT: Final = 125
_UNITS: Final = (("acc", "m/s^2"), ("gyro", "rad/s"), ("mag", "normalised field"))
_PLACES: Final = ("torso", "right_arm", "left_arm", "right_leg", "left_leg")
_CHANNELS: Final = tuple(
    Channel(f"{place}_{sensor}_{axis}", unit)
    for place in _PLACES
    for sensor, unit in _UNITS
    for axis in "xyz"
)
_FILES: Final = re.compile(r"(?:^|/)a(?P<activity>\d\d)/p(?P<subject>\d)/s(?P<segment>\d\d)\.txt$")

_Segments = dict[tuple[int, int], dict[int, "NDArray[np.float32]"]]


def _segments(source: Source, progress: Progress) -> _Segments:
    """(125, 45) arrays by (subject, activity), then segment."""
    found: _Segments = {}
    for match, text in members(source, _FILES, progress):
        name = match.group(0).lstrip("/")
        rows = parse_table(text, len(_CHANNELS), name)
        activity = int(match["activity"])
        if len(rows) != _SEGMENT or not 1 <= activity <= len(DSADS19):
            raise DataError(
                f"{name}: expected {_SEGMENT} rows of activity 1 to {len(DSADS19)}, got {len(rows)} rows"
            )
        of_pair = found.setdefault((int(match["subject"]), activity), {})
        of_pair[int(match["segment"])] = rows.astype(np.float32)
    if not found:
        raise DataError(f"{source.path}: expected data/a01..a19/p1..p8/s01..s60.txt, got none")
    return found


def _recordings(source: Source, progress: Progress) -> Iterator[Recording]:
    for (subject, activity), segments in sorted(_segments(source, progress).items()):
        for number, samples in sorted(segments.items()):
            yield Recording(
                samples=samples,
                labels=np.full(len(samples), activity - 1, np.int16),
                rate_hz=25.0,
                channels=_CHANNELS,
                subject=f"{subject}",
                position="whole body",
                device="xsens mtx",
                session=f"segment-{number:02d}",
            )


def _counts(source: Source, progress: Progress) -> Counts:
    found = _segments(source, progress)
    files = sum(len(segments) for segments in found.values())
    return {
        "files": files,
        "subjects": len({subject for subject, _ in found}),
        "activities": len({activity for _, activity in found}),
        "segments_each": len({number for segments in found.values() for number in segments}),
        "rows": files * _SEGMENT,
        "columns": len(_CHANNELS),
    }


_WHOLE_BODY: Final = Dataset(
    name="dsads",
    title="DSADS: daily and sports activities",
    citation="K. Altun, B. Barshan, O. Tunçel, Comparative study on classifying human activities with miniature "
    "inertial and magnetic sensors, Pattern Recognition 43(10):3605-3620, 2010",
    license="UCI page understood to say CC BY 4.0",
    channels=_CHANNELS,
    label_names=DSADS19,
    rate_hz=25.0,
    window=_SEGMENT,
    stride=_SEGMENT,
    reader=FileReader(
        Layout(
            folders=("dsads",),
            archives=("DSADS*.tar.xz", "daily*and*sports*activities.zip"),
            unpacked=("data", "."),
            probe="a[0-9][0-9]/p[0-9]/s[0-9][0-9].txt",
        ),
        _recordings,
        _counts,
    ),
    domain_groups=(("1", "2"), ("3", "4"), ("5", "6"), ("7", "8")),
    download=Download(
        "https://archive.ics.uci.edu/static/public/256/daily+and+sports+activities.zip",
        "daily+and+sports+activities.zip",
        "",
        500 << 20,
    ),
    notes="all five units in one window of 45 channels; the order of the activities in time is not known",
)


def _one_position_a_recording() -> Dataset:
    """Nine channels, one recording for each unit on the body."""
    groups = tuple(
        ChannelGroup(place, tuple(range(9 * number, 9 * number + 9))) for number, place in enumerate(_PLACES)
    )
    channels = tuple(Channel(f"{sensor}_{axis}", unit) for sensor, unit in _UNITS for axis in "xyz")
    return replace(
        _WHOLE_BODY, channels=channels, reader=SlicedReader(_WHOLE_BODY.reader, channels, groups, "position")
    )


def _one_kind_of_sensor_a_recording() -> Dataset:
    """Fifteen channels, one recording for each kind of sensor (the benchmark's "devices", specs/ood.md 1.3).

    The three kinds measure different things in different units, which is the shift of this scenario.
    """
    groups = tuple(
        ChannelGroup(
            name, tuple(9 * place + 3 * kind + axis for place in range(len(_PLACES)) for axis in range(3))
        )
        for kind, name in enumerate(("accelerometer", "gyroscope", "magnetometer"))
    )
    channels = tuple(Channel(f"{place}_{axis}", "of the sensor") for place in _PLACES for axis in "xyz")
    reader = SlicedReader(_WHOLE_BODY.reader, channels, groups, "device")
    return replace(_WHOLE_BODY, channels=channels, reader=reader, kernel=5)


DSADS: Final = replace(
    _WHOLE_BODY,
    views={
        "cross-position": _one_position_a_recording(),
        "cross-device": _one_kind_of_sensor_a_recording(),
    },
)
