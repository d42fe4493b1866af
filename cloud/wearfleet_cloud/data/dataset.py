"""What a data set is: its description, and the reader that yields its recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.recording import Channel, Recording
from wearfleet_protos.windowing import WindowSpec

__all__ = [
    "INERTIAL6",
    "UNKNOWN_SUBJECT",
    "Counts",
    "Dataset",
    "Download",
    "Progress",
    "Reader",
    "silent",
]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``, with ``done`` growing up to ``total`` in a unit of the caller's choice."""

Counts = Mapping[str, int | Mapping[str, int]]
"""What a reader found: a number a name, or a number for each value of a name."""

UNKNOWN_SUBJECT: Final = "unknown"
"""Subject of a recording whose wearer the distribution does not tell."""

INERTIAL6: Final = tuple(
    Channel(f"{sensor}_{axis}", unit)
    for sensor, unit in (("acc", "m/s^2"), ("gyro", "rad/s"))
    for axis in "xyz"
)
"""Accelerometer (with gravity) and gyroscope in canonical units: acc_x ... gyro_z."""


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""
    del what, done, total


class Reader(Protocol):
    """How a data set's recordings are had from the data root."""

    def fingerprint(self, root: Path | None) -> str:
        """Text that changes whenever the recordings could; cheap, reads no content."""
        ...

    def read(self, root: Path | None, progress: Progress) -> Iterator[Recording]:
        """Every recording, in canonical units, each subject's in time order."""
        ...

    def counts(self, root: Path | None, progress: Progress) -> Counts:
        """What the distribution holds, quirks included."""
        ...


@dataclass(frozen=True, slots=True)
class Download:
    """Where the official distribution is offered.

    Args:
        address: https address of one archive.
        file_name: what it is called in the data root.
        sha256: hex digest of the archive, empty when nobody has published one.
        max_bytes: a larger answer is refused.
    """

    address: str
    file_name: str
    sha256: str
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """One data set and how it is cut into windows.

    Args:
        name: as given on the command line.
        title: for people.
        citation: the paper to cite.
        license: terms of use, and how sure we are of them.
        channels: C channels with canonical units.
        label_names: the K classes of the windows, in class order.
        rate_hz: samples a second of every recording.
        window: samples a window.
        stride: samples between window starts.
        reader: yields the recordings.
        other_labels: further labels K, K+1, ... that the recordings carry; samples with them are left
            unlabelled in the prepared set, so no window belongs to them.
        domain_groups: subjects of each domain of the cross-person scenario.
        group_size: where ``domain_groups`` is empty: so many consecutive subjects form a domain.
        time_domains: parts into which cross-time cuts everybody's time, at least 2.
        members: names of the data sets it was joined from; subjects are then ``<member>/<subject>``.
        target_part: share of a target domain that is tested on, drawn class by class with the scenario's seed; below
            1 only where a protocol demands it.
        views: the same measurements cut for another scenario, by the name of the scenario, such as one
            recording a body position where a recording here holds all of them; each has the same name.
        kernel: length of convolutions that suits its windows (specs/ood.md 1.4).
        download: official address, None where there is none.
        notes: what a user must know about this distribution.
        version: raise it when the reader's output changes; caches of older versions are not used.
        simulated: True when no person was measured.

    Raises:
        ConfigError: no channels or labels, a label named twice, neither groups nor a group size, fewer than two
            time domains, a target part outside (0, 1], or a view with another name or other labels.
    """

    name: str
    title: str
    citation: str
    license: str
    channels: tuple[Channel, ...]
    label_names: tuple[str, ...]
    rate_hz: float
    window: int
    stride: int
    reader: Reader
    other_labels: tuple[str, ...] = ()
    domain_groups: tuple[tuple[str, ...], ...] = ()
    group_size: int = 1
    time_domains: int = 4
    members: tuple[str, ...] = ()
    target_part: float = 1.0
    views: Mapping[str, Dataset] = field(default_factory=dict)
    kernel: int = 9
    download: Download | None = None
    notes: str = ""
    version: int = 1
    simulated: bool = False

    def __post_init__(self) -> None:
        labels = (*self.label_names, *self.other_labels)
        if not self.channels or not self.label_names or len(set(labels)) != len(labels):
            raise ConfigError(f"data set {self.name}: needs channels and distinct label names, got {labels}")
        if self.group_size < 1:
            raise ConfigError(f"data set {self.name}: group_size must be at least 1, got {self.group_size}")
        if self.time_domains < 2:
            raise ConfigError(f"data set {self.name}: needs at least 2 time domains, got {self.time_domains}")
        if not 0.0 < self.target_part <= 1.0:
            raise ConfigError(f"data set {self.name}: target_part must be in (0, 1], got {self.target_part}")
        for scenario, view in self.views.items():
            if (view.name, view.label_names) != (self.name, self.label_names):
                raise ConfigError(f"data set {self.name}: its view for {scenario} must keep name and labels")

    def for_scenario(self, scenario: str) -> Dataset:
        """What to prepare for a scenario: the view made for it, else the data set itself."""
        return self.views.get(scenario, self)

    @property
    def spec(self) -> WindowSpec:
        """How its recordings are cut."""
        return WindowSpec(self.window, self.stride, self.rate_hz)
