"""Prepare a data set once into a cache: gapless samples and labelled windows as flat files, mapped on every load."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from wearfleet_protos.errors import DataError, NotFoundError, ShapeError
from wearfleet_protos.labels import UNLABELLED
from wearfleet_protos.recording import Recording, save_recordings
from wearfleet_protos.windowing import cut_labelled

from wearfleet_cloud.data.dataset import Counts, Dataset, Progress, silent
from wearfleet_cloud.data.windows import WindowSet

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["Prepared", "RecordingEntry", "counts_of", "default_cache_dir", "prepare", "write_replays"]

_log = logging.getLogger(__name__)

_FORMAT: Final = 1
_ABANDONED_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class RecordingEntry:
    """One recording in the cache: its origin and its rows [begin, end) of the sample file."""

    subject: str
    position: str
    device: str
    session: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A data set ready for use.

    Args:
        dataset: its description.
        windows: every labelled window.
        entries: its recordings, in the order of ``windows.recording``.
        samples: (total, C) float32 of all recordings one after the other, memory mapped.
        labels: (total,) int16 class of each sample, -1 where it has none of the window classes.
    """

    dataset: Dataset
    windows: WindowSet
    entries: tuple[RecordingEntry, ...]
    samples: NDArray[np.float32]
    labels: NDArray[np.int16]

    @property
    def subjects(self) -> tuple[str, ...]:
        """Every wearer who was recorded, sorted."""
        return tuple(sorted({entry.subject for entry in self.entries}))

    def recordings_of(self, subject: str) -> tuple[Recording, ...]:
        """One person's recordings in time order.

        Raises:
            NotFoundError: no such subject; names the known ones.
        """
        own = sorted((e for e in self.entries if e.subject == subject), key=lambda e: (e.session, e.begin))
        if not own:
            raise NotFoundError(
                f"data set {self.dataset.name} has no subject {subject!r}; known: {', '.join(self.subjects)}"
            )
        return tuple(
            Recording(
                samples=np.asarray(self.samples[entry.begin : entry.end]),
                labels=np.asarray(self.labels[entry.begin : entry.end]),
                rate_hz=self.dataset.rate_hz,
                channels=self.dataset.channels,
                subject=entry.subject,
                position=entry.position,
                device=entry.device,
                session=entry.session,
            )
            for entry in own
        )


def default_cache_dir() -> Path:
    """Where prepared data sets lie unless told otherwise: ``~/.cache/wearfleet``."""
    return Path.home() / ".cache" / "wearfleet"


def prepare(
    dataset: Dataset, data_root: Path | None, cache_dir: Path, progress: Progress = silent
) -> Prepared:
    """Load a data set from the cache, building it there first when it is missing, outdated or damaged.

    The cache entry is keyed by the description, the reader's version and the distribution's name, size and time. It
    is built in a folder beside it and renamed when complete, so an interrupted or failed build leaves no entry.

    Args:
        dataset: which one.
        data_root: folder with the distributions; None only for simulated sets.
        cache_dir: made when missing.
        progress: told about reading and cutting.

    Raises:
        DataError: the distribution is missing, truncated or malformed.
    """
    folder = cache_dir / f"{dataset.name}-{_key(dataset, data_root)}"
    if folder.is_dir():
        try:
            return _load(dataset, folder)
        except DataError as error:
            _log.warning("cache entry is rebuilt: %s", error)
            shutil.rmtree(folder)
    cache_dir.mkdir(parents=True, exist_ok=True)
    _sweep(cache_dir)
    building = Path(tempfile.mkdtemp(dir=cache_dir, prefix=f".building-{dataset.name}-"))
    try:
        _build(dataset, dataset.reader.read(data_root, progress), building)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise  # not the case that another process was faster
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return _load(dataset, folder)


def counts_of(
    dataset: Dataset, data_root: Path | None, cache_dir: Path, progress: Progress = silent
) -> Counts:
    """What the distribution holds; counted once, then remembered in the cache.

    Raises:
        DataError: as for :func:`prepare`.
    """
    file = cache_dir / f"{dataset.name}-{_key(dataset, data_root)}.counts.json"
    if file.is_file():
        remembered: Counts = json.loads(file.read_text())
        return remembered
    counts = dataset.reader.counts(data_root, progress)
    cache_dir.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(counts))
    part.replace(file)
    return counts


def write_replays(
    prepared: Prepared, folder: Path, subjects: tuple[str, ...] | None = None
) -> tuple[Path, ...]:
    """Write one replay file a person for the agent's replay sensor.

    Args:
        prepared: where from.
        folder: made when missing.
        subjects: whose; None for everybody.

    Returns:
        ``<data set>-<subject>.npz`` in the order of the subjects.

    Raises:
        NotFoundError: an unknown subject.
    """
    paths = []
    for subject in prepared.subjects if subjects is None else subjects:
        path = folder / f"{prepared.dataset.name}-{subject}.npz"
        save_recordings(path, prepared.recordings_of(subject), prepared.dataset.label_names)
        paths.append(path)
    return tuple(paths)


def _sweep(cache_dir: Path) -> None:
    """Remove what builds that were killed more than a day ago have left."""
    for building in cache_dir.glob(".building-*"):
        if time.time() - building.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(building, ignore_errors=True)


def _key(dataset: Dataset, data_root: Path | None) -> str:
    description = {
        "format": _FORMAT,
        "name": dataset.name,
        "version": dataset.version,
        "channels": [asdict(channel) for channel in dataset.channels],
        "labels": [*dataset.label_names, *dataset.other_labels],
        "classes": len(dataset.label_names),
        "spec": asdict(dataset.spec),
        "source": dataset.reader.fingerprint(data_root),
    }
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _build(dataset: Dataset, recordings: Iterator[Recording], folder: Path) -> None:
    """Write samples, labels, windows and the index of a data set."""
    entries: list[RecordingEntry] = []
    total = windows = 0
    names = ("samples", "labels", "x", "activity", "recording", "start")
    files = {name: (folder / f"{name}.bin").open("wb") for name in names}
    try:
        for number, recording in enumerate(recordings):
            own = _with_window_classes(dataset, recording)
            cut = cut_labelled(own, dataset.spec).labelled()
            end = total + len(own.samples)
            entries.append(RecordingEntry(own.subject, own.position, own.device, own.session, total, end))
            total, windows = end, windows + len(cut)
            origin = np.full(len(cut), number, np.int64)
            arrays: tuple[NDArray[Any], ...] = (own.samples, own.labels, cut.x, cut.y, origin, cut.start)
            for name, array in zip(names, arrays, strict=True):
                files[name].write(np.ascontiguousarray(array).data)
    finally:
        for file in files.values():
            file.close()
    if windows == 0:
        raise DataError(
            f"data set {dataset.name}: no labelled window in {len(entries)} recordings; check its reader"
        )
    columns = [field.name for field in fields(RecordingEntry)]
    rows = [{name: getattr(entry, name) for name in columns} for entry in entries]  # asdict copies deeply
    index = {"total": total, "windows": windows, "entries": rows}
    (folder / "index.json").write_text(json.dumps(index))


def _with_window_classes(dataset: Dataset, recording: Recording) -> Recording:
    """The recording with labels of the window classes only, checked against the description."""
    where = f"data set {dataset.name}, subject {recording.subject}, session {recording.session}"
    if recording.channels != dataset.channels or recording.rate_hz != dataset.rate_hz:
        raise DataError(
            f"{where}: expected {len(dataset.channels)} channels {dataset.channels} at {dataset.rate_hz} Hz, got "
            f"{recording.channels} at {recording.rate_hz} Hz; correct the reader or the description"
        )
    known = len(dataset.label_names) + len(dataset.other_labels)
    if len(recording.labels) and not UNLABELLED <= recording.labels.min() <= recording.labels.max() < known:
        raise DataError(
            f"{where}: expected labels -1 to {known - 1}, got {recording.labels.min()} to {recording.labels.max()}"
        )
    if not bool(np.isfinite(recording.samples).all()):
        raise DataError(f"{where}: samples hold NaN or infinity; the reader must interpolate or split there")
    kept = np.where(recording.labels < len(dataset.label_names), recording.labels, UNLABELLED).astype(
        np.int16
    )
    return Recording(
        recording.samples,
        kept,
        recording.rate_hz,
        recording.channels,
        recording.subject,
        recording.position,
        recording.device,
        recording.session,
    )


def _load(dataset: Dataset, folder: Path) -> Prepared:
    """Map a cache entry; DataError when a file is missing or has another size."""
    channels = len(dataset.channels)
    try:
        index = json.loads((folder / "index.json").read_text())
        entries = tuple(RecordingEntry(**entry) for entry in index["entries"])
        total, number = int(index["total"]), int(index["windows"])
        recording = np.array(_map(folder, "recording", np.int64, (number,)))
        windows = WindowSet(
            x=_map(folder, "x", np.float32, (number, channels, dataset.window)),
            activity=np.array(_map(folder, "activity", np.int64, (number,))),
            subject=np.array([entry.subject for entry in entries])[recording],
            position=np.array([entry.position for entry in entries])[recording],
            device=np.array([entry.device for entry in entries])[recording],
            session=np.array([entry.session for entry in entries])[recording],
            recording=recording,
            start=np.array(_map(folder, "start", np.int64, (number,))),
        )
        samples = _map(folder, "samples", np.float32, (total, channels))
        labels = _map(folder, "labels", np.int16, (total,))
    except (OSError, ValueError, KeyError, TypeError, IndexError, ShapeError) as error:
        raise DataError(f"{folder}: not a complete cache entry ({error})") from error
    return Prepared(dataset, windows, entries, samples, labels)


def _map(folder: Path, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    file = folder / f"{name}.bin"
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if file.stat().st_size != expected:
        raise ValueError(f"{file.name}: expected {expected} bytes, got {file.stat().st_size}")
    return np.memmap(file, dtype=dtype, mode="r", shape=shape)
