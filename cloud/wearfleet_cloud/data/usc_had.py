"""USC-HAD: one MotionNode at the front right hip, 14 people, 12 activities, 100 Hz, MATLAB files.

The label is taken from the file name: one file misspells the field (``activity_numbr``) and
``Subject14/a3t2.mat`` carries the wrong number in it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from wearfleet_protos.errors import DataError
from wearfleet_protos.labels import USC_HAD12
from wearfleet_protos.recording import Channel, Recording
from wearfleet_protos.windowing import convert_units

from wearfleet_cloud.data.dataset import INERTIAL6, Counts, Dataset, Download, Progress
from wearfleet_cloud.data.file_reader import FileReader
from wearfleet_cloud.data.layout import Layout, Source, members

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["USC_HAD"]

_FILES: Final = re.compile(r"(?:^|/)Subject(?P<subject>\d+)/a(?P<activity>\d+)t(?P<trial>\d+)\.mat$")
_MEASURED: Final = tuple(Channel(c.name, "g" if c.unit == "m/s^2" else "deg/s") for c in INERTIAL6)


@dataclass(frozen=True, slots=True)
class _Trial:
    """One file: who, which trial, which activity (1-based), (T, 6) samples, and the names of its fields."""

    subject: int
    trial: int
    activity: int
    samples: NDArray[np.float32]
    fields: frozenset[str]
    stated_activity: str


def _trials(source: Source, progress: Progress) -> list[_Trial]:
    """Every file, ordered by subject, trial, activity."""
    trials = [_trial(match, content) for match, content in members(source, _FILES, progress)]
    if not trials:
        raise DataError(f"{source.path}: expected USC-HAD/Subject<n>/a<activity>t<trial>.mat files, got none")
    return sorted(trials, key=lambda t: (t.subject, t.trial, t.activity))


def _trial(match: re.Match[str], content: bytes) -> _Trial:
    name = match.group(0).lstrip("/")
    activity = int(match["activity"])
    if not 1 <= activity <= len(USC_HAD12):
        raise DataError(
            f"{name}: expected an activity from 1 to {len(USC_HAD12)} in the file name, got {activity}"
        )
    from scipy.io import loadmat  # type: ignore[import-untyped]  # noqa: PLC0415 - training needs no scipy otherwise

    try:
        fields: dict[str, Any] = loadmat(io.BytesIO(content))
        samples = np.asarray(fields["sensor_readings"], np.float32)
    except Exception as error:  # scipy raises a dozen types for damaged files
        raise DataError(
            f"{name}: not a readable MATLAB file with sensor_readings ({error}); fetch it again"
        ) from error
    if samples.ndim != 2 or samples.shape[1] != 6 or len(samples) == 0 or not np.isfinite(samples).all():
        raise DataError(f"{name}: expected finite sensor_readings of N x 6, got shape {samples.shape}")
    stated = fields.get("activity_number", fields.get("activity_numbr", [""]))
    return _Trial(
        subject=int(match["subject"]),
        trial=int(match["trial"]),
        activity=activity,
        samples=samples,
        fields=frozenset(fields),
        stated_activity=str(np.ravel(stated)[0]).strip(),
    )


def _recordings(source: Source, progress: Progress) -> Iterator[Recording]:
    for trial in _trials(source, progress):
        yield Recording(
            samples=convert_units(trial.samples, _MEASURED, INERTIAL6),
            labels=np.full(len(trial.samples), trial.activity - 1, np.int16),
            rate_hz=100.0,
            channels=INERTIAL6,
            subject=f"{trial.subject:02d}",
            position="front right hip",
            device="motionnode",
            session=f"trial-{trial.trial}",
        )


def _counts(source: Source, progress: Progress) -> Counts:
    trials = _trials(source, progress)
    return {
        "files": len(trials),
        "subjects": len({t.subject for t in trials}),
        "activities": len({t.activity for t in trials}),
        "trials_each": len({t.trial for t in trials}),
        "rows": sum(len(t.samples) for t in trials),
        "misspelled_activity_field": sum("activity_numbr" in t.fields for t in trials),
        "activity_field_disagrees": sum(t.stated_activity != str(t.activity) for t in trials),
        "extra_comments_field": sum("comments" in t.fields for t in trials),
    }


def _groups() -> tuple[tuple[str, ...], ...]:
    """The benchmark's person groups; it stores subject n as n - 1 (specs/ood.md 1.2)."""
    stored = ((1, 11, 2, 0), (6, 3, 9, 5), (7, 13, 8, 10), (4, 12))
    return tuple(tuple(f"{subject + 1:02d}" for subject in group) for group in stored)


USC_HAD: Final = Dataset(
    name="usc-had",
    title="USC-HAD: USC human activity dataset",
    citation="M. Zhang, A. A. Sawchuk, USC-HAD: A Daily Activity Dataset for Ubiquitous Activity Recognition Using "
    "Wearable Sensors, ACM UbiComp 2012 Workshop SAGAware",
    license="offered by its authors as freely available research benchmark; no formal licence text found",
    channels=INERTIAL6,
    label_names=USC_HAD12,
    rate_hz=100.0,
    window=200,
    stride=100,
    reader=FileReader(
        Layout(
            folders=("usc-had",),
            archives=("USC-HAD*.zip",),
            unpacked=("USC-HAD", "."),
            probe="Subject*/a*t*.mat",
        ),
        _recordings,
        _counts,
    ),
    domain_groups=_groups(),
    kernel=6,
    download=Download("https://sipi.usc.edu/had/USC-HAD.zip", "USC-HAD.zip", "", 200 << 20),
    notes="labels come from the file names; the order of the activities within a trial is not known",
)
