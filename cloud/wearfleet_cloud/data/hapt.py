"""HAPT: smartphone at the waist, 30 people, 50 Hz, six activities and six postural transitions (UCI 341).

The raw recordings behind UCI-HAR. They are cut into windows of 128 samples with 50 % overlap as UCI-HAR's are,
but *unfiltered*: UCI-HAR's median filter and 20 Hz low-pass are not applied, because a device would have to apply
them too, and training and serving share one windowing. Gravity stays in the acceleration. Windows begin at
multiples of 64 samples of each recording, as on a device, not at the first sample of each labelled stretch.

The six transitions are labels of the recordings (classes 6 to 11) but no class of the prepared windows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import DataError
from wearfleet_protos.labels import UCI_HAR6, UNLABELLED
from wearfleet_protos.recording import Channel, Recording
from wearfleet_protos.windowing import convert_units

from wearfleet_cloud.data.dataset import INERTIAL6, Counts, Dataset, Download, Progress
from wearfleet_cloud.data.file_reader import FileReader
from wearfleet_cloud.data.layout import Layout, Source, members
from wearfleet_cloud.data.number_table import parse_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["HAPT"]

TRANSITIONS: Final = (
    "stand to sit",
    "sit to stand",
    "sit to lie",
    "lie to sit",
    "stand to lie",
    "lie to stand",
)

_FILES: Final = re.compile(
    r"(?:^|/)(?:RawData/(?:(?P<sensor>acc|gyro)_exp(?P<experiment>\d+)_user(?P<user>\d+)|(?P<labels>labels))"
    r"|(?P<part>Train|Test)/(?P<column>y|subject_id)_\w+)\.txt$"
)
_MEASURED: Final = tuple(Channel(c.name, "g" if c.unit == "m/s^2" else c.unit) for c in INERTIAL6)


@dataclass(slots=True)
class _Content:
    """What the distribution holds, keyed by (experiment, user) or by the official part."""

    signals: dict[str, dict[tuple[int, int], NDArray[np.float32]]] = field(
        default_factory=lambda: {"acc": {}, "gyro": {}}
    )
    labels: NDArray[np.int64] | None = None
    official: dict[tuple[str, str], NDArray[np.int64]] = field(default_factory=dict)


def _load(source: Source, progress: Progress) -> _Content:
    content = _Content()
    for match, text in members(source, _FILES, progress):
        name = match.group(0).lstrip("/")
        if match["sensor"]:
            key = (int(match["experiment"]), int(match["user"]))
            content.signals[match["sensor"]][key] = parse_table(text, 3, name).astype(np.float32)
        elif match["labels"]:
            content.labels = parse_table(text, 5, name).astype(np.int64)
        else:
            content.official[match["part"], match["column"]] = parse_table(text, 1, name).astype(np.int64)[
                :, 0
            ]
    _check(content, source)
    return content


def _check(content: _Content, source: Source) -> None:
    acc, gyro = content.signals["acc"], content.signals["gyro"]
    if not acc or acc.keys() != gyro.keys() or content.labels is None:
        raise DataError(
            f"{source.path}: expected RawData/labels.txt and one gyro file for each acc file, got {len(acc)} acc and "
            f"{len(gyro)} gyro files{'' if content.labels is not None else ' and no labels.txt'}; fetch it again"
        )
    for key, signal in acc.items():
        if len(signal) != len(gyro[key]):
            raise DataError(
                f"experiment {key[0]}: {len(signal)} acc rows but {len(gyro[key])} gyro rows; one file is truncated"
            )
    for experiment, user, activity, start, end in content.labels.tolist():
        size = len(acc.get((experiment, user), ()))
        if not (1 <= start <= end <= size and 1 <= activity <= len(UCI_HAR6) + len(TRANSITIONS)):
            raise DataError(
                f"labels.txt: row {(experiment, user, activity, start, end)} does not fit its recording of {size} "
                "samples (1-based, inclusive) or the 12 activities"
            )


def _recordings(source: Source, progress: Progress) -> Iterator[Recording]:
    content = _load(source, progress)
    assert content.labels is not None  # checked by _load
    for key, acc in sorted(content.signals["acc"].items()):
        labels = np.full(len(acc), UNLABELLED, np.int16)
        for experiment, user, activity, start, end in content.labels.tolist():
            if (experiment, user) == key:
                labels[start - 1 : end] = activity - 1
        yield Recording(
            samples=convert_units(np.hstack((acc, content.signals["gyro"][key])), _MEASURED, INERTIAL6),
            labels=labels,
            rate_hz=50.0,
            channels=INERTIAL6,
            subject=f"{key[1]:02d}",
            position="waist",
            device="smartphone",
            session=f"experiment-{key[0]:02d}",
        )


def _counts(source: Source, progress: Progress) -> Counts:
    content = _load(source, progress)
    assert content.labels is not None  # checked by _load
    signals = content.signals
    counts: dict[str, int] = {
        "experiments": len(signals["acc"]),
        "users": len({user for _, user in signals["acc"]}),
        "acc_rows": sum(len(s) for s in signals["acc"].values()),
        "gyro_rows": sum(len(s) for s in signals["gyro"].values()),
        "label_rows": len(content.labels),
        "activities": len(np.unique(content.labels[:, 2])),
    }
    for part in ("Train", "Test"):
        if (part, "y") in content.official and (part, "subject_id") in content.official:
            counts[f"official_{part.lower()}_windows"] = len(content.official[part, "y"])
            counts[f"official_{part.lower()}_users"] = len(np.unique(content.official[part, "subject_id"]))
    return counts


HAPT: Final = Dataset(
    name="hapt",
    title="HAPT: smartphone-based recognition of human activities and postural transitions",
    citation="J.-L. Reyes-Ortiz, L. Oneto, A. Samà, X. Parra, D. Anguita, Transition-Aware Human Activity "
    "Recognition Using Smartphones, Neurocomputing, 2015",
    license="authors' README: cite the paper, as is, any commercial use prohibited; UCI page understood to say "
    "CC BY 4.0: treat as non-commercial research use",
    channels=INERTIAL6,
    label_names=UCI_HAR6,
    other_labels=TRANSITIONS,
    rate_hz=50.0,
    window=128,
    stride=64,
    reader=FileReader(
        Layout(
            folders=("hapt",),
            archives=("HAPT*.tar.xz", "smartphone*postural*transitions.zip", "HAPT*.zip"),
            unpacked=("HAPT Data Set", "."),
            probe="RawData/labels.txt",
        ),
        _recordings,
        _counts,
    ),
    domain_groups=tuple(
        tuple(f"{user:02d}" for user in range(first, first + 6)) for first in range(1, 31, 6)
    ),
    time_domains=5,
    download=Download(
        "https://archive.ics.uci.edu/static/public/341/"
        "smartphone+based+recognition+of+human+activities+and+postural+transitions.zip",
        "smartphone+based+recognition+of+human+activities+and+postural+transitions.zip",
        "4ac4ae064227c07045a99551876b54d204837e995e298b6488559e209b3deb09",
        200 << 20,
    ),
    notes="windows are raw (no median or 20 Hz filter); transitions are labels of recordings, not classes of windows",
)
