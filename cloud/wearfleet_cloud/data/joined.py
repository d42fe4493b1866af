"""Several data sets as one: the channels, classes, rate and axes that they have in common.

Corrected, the default: accelerometer in m/s^2 and gyroscope in rad/s, axes turned to up, forward, left of the body,
and the whole recordings brought to one rate by the polyphase resampler that devices use, once and deterministically.

Strict, as published (specs/ood.md 1.3, P19, P20): the units and axes of each distribution, one of every so many
samples without a filter, from a random offset. Differs even so: the offset of a data set is drawn once, not once for
each part of the split, and windows are cut from the recordings, not once more from windows that were cut before.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import ConfigError, DataError
from wearfleet_protos.labels import UNLABELLED
from wearfleet_protos.recording import Channel, Recording
from wearfleet_protos.windowing import convert_units, resample

from wearfleet_cloud.data.dataset import INERTIAL6, Counts, Dataset, Progress
from wearfleet_cloud.data.file_reader import count_recordings

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["AXES_AS_THEY_ARE", "STRICT_CHANNELS", "JoinedReader", "Member"]

_log = logging.getLogger(__name__)

Axes = tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]

AXES_AS_THEY_ARE: Final[Axes] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
"""For a sensor whose x, y, z point up, forward and left when its wearer stands."""


STRICT_CHANNELS: Final = tuple(Channel(channel.name, "of the data set") for channel in INERTIAL6)
"""Of the strict form, in which every member has units of its own."""


@dataclass(frozen=True, slots=True)
class Member:
    """One of the data sets that are joined.

    Args:
        dataset: which one, or a view of it; its recordings hold accelerometer and gyroscope among other things.
        positions: only recordings made there are used; empty for all.
        classes: its class names -> those of the joined set; samples of other classes become unlabelled.
        axes: rows say how up, forward and left of a standing wearer are made of the sensor's x, y, z.
        units: of accelerometer and gyroscope in the distribution, which the strict form goes back to.

    Raises:
        ConfigError: a class that the data set lacks, axes that are no rotation, or no inertial channels.
    """

    dataset: Dataset
    classes: Mapping[str, str]
    positions: tuple[str, ...] = ()
    axes: Axes = AXES_AS_THEY_ARE
    units: tuple[str, str] = ("m/s^2", "rad/s")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.classes) - set(self.dataset.label_names))
        if unknown:
            raise ConfigError(f"data set {self.dataset.name} has no classes {unknown}")
        turn = np.array(self.axes)
        if not np.array_equal(turn @ turn.T, np.eye(3)) or round(np.linalg.det(turn)) != 1:
            raise ConfigError(
                f"data set {self.dataset.name}: axes {self.axes} are not a rotation by right angles"
            )
        if not set(INERTIAL6) <= set(self.dataset.channels):
            raise ConfigError(f"data set {self.dataset.name} lacks some of the channels {INERTIAL6}")


@dataclass(frozen=True, slots=True)
class JoinedReader:
    """Recordings of all members in common form (implements :class:`wearfleet_cloud.data.dataset.Reader`).

    Members whose distribution is not in the data root are left out and named in a warning; two must be there. Subjects
    become ``<member>/<subject>``, so whatever was made of the set says which members it saw. A joined sample carries
    the label of the original sample at its instant; recordings without a common class are left out.

    Args:
        members: in the order of the domains.
        label_names: of the joined set.
        rate_hz: common rate; each member's is a whole multiple of it.
        strict: as published; see the module.
    """

    members: tuple[Member, ...]
    label_names: tuple[str, ...]
    rate_hz: float
    strict: bool = False

    def __post_init__(self) -> None:
        for member in self.members:
            if member.dataset.rate_hz % self.rate_hz:
                raise ConfigError(
                    f"data set {member.dataset.name}: {member.dataset.rate_hz} Hz is no multiple of {self.rate_hz} Hz"
                )

    def fingerprint(self, root: Path | None) -> str:
        """Digest over the members that are there and how they are joined; DataError when fewer than two are."""
        parts = [repr((self.label_names, self.rate_hz, self.strict))]
        for member, content in self._present(root):
            known = member.dataset
            how = (
                known.name,
                known.version,
                sorted(member.classes.items()),
                member.positions,
                member.axes,
                member.units,
            )
            parts += [repr(how), content]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def read(self, root: Path | None, progress: Progress) -> Iterator[Recording]:
        """Every recording with a common class, member after member; DataError when fewer than two are there."""
        present = tuple(member for member, _ in self._present(root))
        missing = [member.dataset.name for member in self.members if member not in present]
        if missing:
            _log.warning("joined without %s: not in %s", ", ".join(missing), root)
        for member in present:
            number = self._class_numbers(member)
            offset = _offset(member, round(member.dataset.rate_hz / self.rate_hz))
            for recording in member.dataset.reader.read(root, progress):
                labels = number[recording.labels]
                used = not member.positions or recording.position in member.positions
                if used and (labels != UNLABELLED).any():
                    yield self._joined(member, replace(recording, labels=labels), offset)

    def counts(self, root: Path | None, progress: Progress) -> Counts:
        """Recordings, subjects and samples by label, and the recordings of each member (0: not there)."""
        members = dict.fromkeys((member.dataset.name for member in self.members), 0)

        def seen() -> Iterator[Recording]:
            for recording in self.read(root, progress):
                members[recording.subject.partition("/")[0]] += 1
                yield recording

        return {**count_recordings(seen()), "recordings_by_member": members}

    def _present(self, root: Path | None) -> tuple[tuple[Member, str], ...]:
        """The members whose distribution is there, each with its fingerprint."""
        present, missing = [], []
        for member in self.members:
            try:
                present.append((member, member.dataset.reader.fingerprint(root)))
            except DataError as error:
                missing.append(str(error))
        if len(present) < min(2, len(self.members)):
            raise DataError(
                f"of {', '.join(m.dataset.name for m in self.members)} at least two must be in the data root; "
                + "; ".join(missing)
            )
        return tuple(present)

    def _class_numbers(self, member: Member) -> NDArray[np.int16]:
        """Joined class by class of the member; the last entry is that of label -1."""
        own = (*member.dataset.label_names, *member.dataset.other_labels)
        names = [member.classes.get(name) for name in own]
        numbers = [UNLABELLED if name is None else self.label_names.index(name) for name in names]
        return np.array([*numbers, UNLABELLED], np.int16)

    def _joined(self, member: Member, recording: Recording, offset: int) -> Recording:
        columns = [recording.channels.index(channel) for channel in INERTIAL6]
        samples = np.ascontiguousarray(recording.samples[:, columns])
        step = round(recording.rate_hz / self.rate_hz)
        if self.strict:
            acc, gyro = member.units
            measured = tuple(Channel(c.name, acc if c.unit == "m/s^2" else gyro) for c in INERTIAL6)
            samples, labels = (
                convert_units(samples, INERTIAL6, measured)[offset::step],
                recording.labels[offset::step],
            )
        else:
            turn = np.array(member.axes, np.float32)
            turned = (samples.reshape(-1, 2, 3) @ turn.T).reshape(-1, 6)
            samples, labels = resample(turned, recording.rate_hz, self.rate_hz), recording.labels[::step]
        return replace(
            recording,
            samples=np.ascontiguousarray(samples),
            labels=np.ascontiguousarray(labels),
            rate_hz=self.rate_hz,
            channels=STRICT_CHANNELS if self.strict else INERTIAL6,
            subject=f"{member.dataset.name}/{recording.subject}",
        )


def _offset(member: Member, step: int) -> int:
    """Which of ``step`` samples the strict form keeps: random, and the same for all recordings of a data set."""
    seed = int.from_bytes(hashlib.sha256(member.dataset.name.encode()).digest()[:4], "big")
    return int(np.random.default_rng(seed).integers(step))
