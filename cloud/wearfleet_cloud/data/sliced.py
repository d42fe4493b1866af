"""One recording of several sensors as several recordings of one sensor each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.recording import Channel, Recording

from wearfleet_cloud.data.dataset import Counts, Progress, Reader

__all__ = ["ChannelGroup", "SlicedReader"]


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Columns of a recording that belong together, in the order of the slice's channels; ``name`` says to what."""

    name: str
    columns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SlicedReader:
    """Yields every recording of another reader once a group (implements :class:`wearfleet_cloud.data.dataset.Reader`).

    The slices of one recording were measured at the same moments: they share no number, but they do share time.

    Args:
        whole: reader of the recordings that hold all groups.
        channels: of a slice.
        groups: columns of each slice.
        origin: which field of the recording gets the group's name.

    Raises:
        ConfigError: a group has another number of columns than ``channels``.
    """

    whole: Reader
    channels: tuple[Channel, ...]
    groups: tuple[ChannelGroup, ...]
    origin: Literal["position", "device"]

    def __post_init__(self) -> None:
        for group in self.groups:
            if len(group.columns) != len(self.channels):
                raise ConfigError(
                    f"channel group {group.name}: expected {len(self.channels)} columns, got {len(group.columns)}"
                )

    def fingerprint(self, root: Path | None) -> str:
        """That of the whole recordings, and how they are sliced."""
        return f"{self.whole.fingerprint(root)} {self.origin} {self.groups}"

    def read(self, root: Path | None, progress: Progress) -> Iterator[Recording]:
        """The slices, group after group of each recording."""
        for recording in self.whole.read(root, progress):
            for group in self.groups:
                samples = np.ascontiguousarray(recording.samples[:, group.columns])
                slice_ = replace(recording, samples=samples, channels=self.channels)
                yield (
                    replace(slice_, position=group.name)
                    if self.origin == "position"
                    else replace(slice_, device=group.name)
                )

    def counts(self, root: Path | None, progress: Progress) -> Counts:
        """What the distribution holds, which slicing does not change."""
        return self.whole.counts(root, progress)
