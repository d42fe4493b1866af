"""A sensor that plays recorded data, in real time, faster, or as fast as the agent can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from wearfleet_protos.errors import DataError
from wearfleet_protos.labels import UNLABELLED
from wearfleet_protos.recording import Recording, load_recordings
from wearfleet_protos.windowing import convert_units, resample

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from wearfleet_protos.plan import InputContract

__all__ = ["Chunk", "ReplaySensor", "conform", "load_replay", "paced"]

_CHUNK_SECONDS = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Some samples that arrive together: (n, C) float32, and (n,) int16 classes as the recording states them.

    ``first`` is True where a new recording begins: no window reaches across.
    """

    samples: NDArray[np.float32]
    labels: NDArray[np.int16]
    first: bool


def load_replay(path: Path) -> tuple[tuple[Recording, ...], tuple[str, ...]]:
    """One person's recordings in time order, and the class names of their labels.

    Raises:
        DataError: not a usable file, or it holds no samples.
    """
    recordings, names = load_recordings(path)
    if not any(len(r.samples) for r in recordings):
        raise DataError(f"{path}: holds no samples")
    return tuple(sorted(recordings, key=lambda r: r.session)), names


def conform(
    recordings: Sequence[Recording], label_names: Sequence[str], contract: InputContract
) -> tuple[Recording, ...]:
    """Bring recordings to a model's channels, units, rate and classes.

    Args:
        recordings: as recorded.
        label_names: what the recordings' class indices mean.
        contract: what the model wants.

    Returns:
        Recordings in the model's form; a class that the model does not know becomes unlabelled.

    Raises:
        DataError: a channel is missing or has a unit without conversion.
    """
    known = {name: index for index, name in enumerate(contract.labels)}
    table = np.array([*(known.get(name, UNLABELLED) for name in label_names), UNLABELLED], np.int16)
    return tuple(_conform_one(recording, table, contract) for recording in recordings)


def _conform_one(recording: Recording, table: NDArray[np.int16], contract: InputContract) -> Recording:
    column = {channel.name: index for index, channel in enumerate(recording.channels)}
    missing = [channel.name for channel in contract.channels if channel.name not in column]
    if missing:
        raise DataError(f"the model needs channels {missing}, the recording has {sorted(column)}")
    chosen = [column[channel.name] for channel in contract.channels]
    have = tuple(recording.channels[index] for index in chosen)
    samples = recording.samples  # shared, not copied, where nothing changes: a device's memory is small
    if recording.channels != contract.channels:
        samples = convert_units(samples[:, chosen], have, contract.channels)
    classes = np.where((recording.labels >= 0) & (recording.labels < len(table) - 1), recording.labels, -1)
    labels = table[classes]
    if recording.rate_hz != contract.rate_hz:
        samples = resample(samples, recording.rate_hz, contract.rate_hz)
        source = np.arange(len(samples)) * (recording.rate_hz / contract.rate_hz)
        labels = labels[np.minimum(source.astype(np.int64), len(labels) - 1)]
    return replace(
        recording, samples=samples, labels=labels, rate_hz=contract.rate_hz, channels=contract.channels
    )


class ReplaySensor:
    """Recordings as a stream of chunks of a tenth of a second.

    Args:
        recordings: conformed recordings of one rate.
        repeat: start again at the end, for ever.
    """

    def __init__(self, recordings: Sequence[Recording], *, repeat: bool) -> None:
        self._recordings = tuple(recordings)
        self._repeat = repeat

    @property
    def num_samples(self) -> int:
        """Samples of one pass."""
        return sum(len(r.samples) for r in self._recordings)

    def chunks(self, skip: int = 0) -> Iterator[Chunk]:
        """The stream, from sample ``skip`` of the first pass on."""
        left = skip % self.num_samples if self._repeat else skip
        while True:
            for recording in self._recordings:
                size = max(1, round(recording.rate_hz * _CHUNK_SECONDS))
                for begin in range(min(left, len(recording.samples)), len(recording.samples), size):
                    part = slice(begin, begin + size)
                    yield Chunk(recording.samples[part], recording.labels[part], begin == 0)
                left = max(0, left - len(recording.samples))
            if not self._repeat:
                return


def paced(
    chunks: Iterator[Chunk],
    rate_hz: float,
    speed: float,
    *,
    monotonic: Callable[[], float],
    wait: Callable[[float], bool],
) -> Iterator[Chunk]:
    """Deliver chunks when their last sample is due.

    Args:
        chunks: the stream.
        rate_hz: samples a second of recorded time.
        speed: recorded seconds a real second; 0 delivers at once.
        monotonic: clock, seconds.
        wait: waits the given seconds and tells whether to stop.

    Yields:
        The chunks until the stream or the agent ends.
    """
    begin = monotonic()
    samples = 0
    for chunk in chunks:
        samples += len(chunk.samples)
        due = begin + samples / rate_hz / speed if speed > 0 else begin
        if wait(max(0.0, due - monotonic())):
            return
        yield chunk
