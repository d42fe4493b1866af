"""WISDM-51: smartphone in the pocket and smartwatch on the wrist, 51 people, 18 activities, 20 Hz (UCI 507).

Accelerometer and gyroscope of a device are separate streams with their own time stamps. Both are interpolated
linearly onto one 20 Hz grid over the time they share; where either stream has a gap of more than a quarter of a
second a new recording begins. One recording is one activity of one person on one device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import DataError
from wearfleet_protos.labels import WISDM18
from wearfleet_protos.recording import Recording

from wearfleet_cloud.data.dataset import INERTIAL6, Counts, Dataset, Download, Progress
from wearfleet_cloud.data.file_reader import FileReader
from wearfleet_cloud.data.gaps import stretches
from wearfleet_cloud.data.layout import Layout, Source, members
from wearfleet_cloud.data.number_table import parse_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["WISDM", "align"]

_LETTERS: Final = "ABCDEFGHIJKLMOPQRS"  # there is no N
_RATE_HZ: Final = 20.0
_MAX_GAP_S: Final = 0.25
_FILES: Final = re.compile(
    r"(?:^|/)raw/(?P<device>phone|watch)/(?P<sensor>accel|gyro)/data_(?P<subject>\d+)_(?P=sensor)_(?P=device)\.txt$"
)
_DEVICES: Final = {"phone": "smartphone", "watch": "smartwatch"}

_Key = tuple[str, str, str]  # subject, device, sensor


def _streams(source: Source, progress: Progress) -> dict[_Key, NDArray[np.float64]]:
    """(n, 5) columns class, seconds, x, y, z of every file."""
    found = {
        (match["subject"], match["device"], match["sensor"]): _parse(match, text)
        for match, text in members(source, _FILES, progress)
    }
    if not found:
        raise DataError(
            f"{source.path}: expected raw/phone|watch/accel|gyro/data_<id>_<sensor>_<device>.txt, got none"
        )
    return found


def _parse(match: re.Match[str], text: bytes) -> NDArray[np.float64]:
    """Parse lines ``id,letter,nanoseconds,x,y,z;``."""
    name = match.group(0).lstrip("/")
    raw = np.frombuffer(text, np.uint8).copy()
    comma = raw == ord(",")
    is_letter = np.zeros(len(raw), np.bool_)
    is_letter[1:-1] = comma[:-2] & comma[2:] & (raw[1:-1] >= ord("A")) & (raw[1:-1] <= ord("S"))
    letters = raw[is_letter]
    raw[is_letter] = ord("0")
    raw[raw == ord(";")] = ord(" ")
    rows = parse_table(raw.tobytes(), 6, name)
    classes = np.full(256, -1, np.int64)
    classes[[ord(letter) for letter in _LETTERS]] = np.arange(len(_LETTERS))
    if (
        len(letters) != len(rows)
        or (rows[:, 0] != float(match["subject"])).any()
        or (classes[letters] < 0).any()
    ):
        raise DataError(
            f"{name}: expected lines `{match['subject']},<letter A-S, no N>,<time>,x,y,z;`, got another id or letter"
        )
    return np.column_stack((classes[letters], rows[:, 2] * 1e-9, rows[:, 3:]))


def _in_time_order(stream: NDArray[np.float64], label: int) -> NDArray[np.float64]:
    """Rows of one class by time, one for each time stamp."""
    rows = stream[stream[:, 0] == label, 1:]
    _, first = np.unique(rows[:, 0], return_index=True)
    return rows[first]


def align(accel: NDArray[np.float64], gyro: NDArray[np.float64]) -> list[NDArray[np.float32]]:
    """Bring two streams onto one 20 Hz grid.

    Args:
        accel: (n, 4) seconds, x, y, z; seconds strictly increasing.
        gyro: (m, 4) likewise, on the same clock.

    Returns:
        Gapless pieces (T, 6) float32, in time order; empty when the streams do not overlap.
    """
    if len(accel) < 2 or len(gyro) < 2:
        return []
    begin, end = max(accel[0, 0], gyro[0, 0]), min(accel[-1, 0], gyro[-1, 0])
    if end <= begin:
        return []
    grid = begin + np.arange(int((end - begin) * _RATE_HZ) + 1) / _RATE_HZ
    valid = np.ones(len(grid), np.bool_)
    columns = []
    for stream in (accel, gyro):
        right = np.clip(np.searchsorted(stream[:, 0], grid), 1, len(stream) - 1)
        valid &= stream[right, 0] - stream[right - 1, 0] <= _MAX_GAP_S
        columns += [np.interp(grid, stream[:, 0], stream[:, axis]) for axis in (1, 2, 3)]
    samples = np.column_stack(columns).astype(np.float32)
    return [samples[piece] for piece in stretches(valid)]


def _recordings(source: Source, progress: Progress) -> Iterator[Recording]:
    streams = _streams(source, progress)
    for subject, device in sorted({(subject, device) for subject, device, _ in streams}):
        accel, gyro = streams.get((subject, device, "accel")), streams.get((subject, device, "gyro"))
        if accel is None or gyro is None:
            raise DataError(f"{source.path}: subject {subject} lacks the accel or gyro file of the {device}")
        by_label = [(label, _in_time_order(accel, label)) for label in range(len(_LETTERS))]
        ordered = sorted((rows[0, 0], label, rows) for label, rows in by_label if len(rows))
        for order, (_, label, rows) in enumerate(ordered):
            for piece, samples in enumerate(align(rows, _in_time_order(gyro, label))):
                yield Recording(
                    samples=samples,
                    labels=np.full(len(samples), label, np.int16),
                    rate_hz=_RATE_HZ,
                    channels=INERTIAL6,
                    subject=subject,
                    position=device,
                    device=_DEVICES[device],
                    session=f"{order:02d}-{piece:03d}",
                )


def _counts(source: Source, progress: Progress) -> Counts:
    streams = _streams(source, progress)
    return {
        "files": len(streams),
        "subjects": len({subject for subject, _, _ in streams}),
        "files_with_all_activities": sum(len(np.unique(s[:, 0])) == len(_LETTERS) for s in streams.values()),
        "rows": {
            f"{device} {sensor}": sum(
                len(s) for (_, d, k), s in streams.items() if (d, k) == (device, sensor)
            )
            for device in ("phone", "watch")
            for sensor in ("accel", "gyro")
        },
    }


WISDM: Final = Dataset(
    name="wisdm-51",
    title="WISDM smartphone and smartwatch activity and biometrics",
    citation="G. M. Weiss, K. Yoneda, T. Hayajneh, Smartphone and Smartwatch-Based Biometrics Using Activities of "
    "Daily Living, IEEE Access 7:133190-133202, 2019",
    license="UCI page understood to say CC BY 4.0",
    channels=INERTIAL6,
    label_names=WISDM18,
    rate_hz=_RATE_HZ,
    window=100,
    stride=50,
    reader=FileReader(
        Layout(
            folders=("wisdm-51",),
            archives=("wisdm-dataset*.tar.xz", "wisdm*smartphone*smartwatch*.zip", "wisdm-dataset*.zip"),
            unpacked=("wisdm-dataset", "."),
            probe="raw/phone/accel/data_*_accel_phone.txt",
        ),
        _recordings,
        _counts,
    ),
    group_size=2,
    download=Download(
        "https://archive.ics.uci.edu/static/public/507/"
        "wisdm+smartphone+and+smartwatch+activity+and+biometrics+dataset.zip",
        "wisdm+smartphone+and+smartwatch+activity+and+biometrics+dataset.zip",
        "",
        600 << 20,
    ),
    notes="positions 'phone' (pocket) and 'watch' (wrist) are separate recordings of the same moments; "
    "position and device change together, so cross-position and cross-device are the same here",
)
