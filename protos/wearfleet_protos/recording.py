"""A recording: one contiguous stretch of one person's sensor samples, and the file a device replays."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from wearfleet_protos.errors import DataError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Channel", "Recording", "load_recordings", "save_recordings"]

_FORMAT: Final = "wearfleet-recordings-1"


@dataclass(frozen=True, slots=True)
class Channel:
    """One sensor axis: ``name`` such as ``acc_x`` and canonical ``unit`` such as ``m/s^2``."""

    name: str
    unit: str


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """One contiguous stretch of samples.

    Args:
        samples: (T, C) float32 in the units of ``channels``.
        labels: (T,) int16 class index a sample, -1 where there is none.
        rate_hz: samples a second.
        channels: C channels.
        subject: who wears it.
        position: where on the body.
        device: which sensor.
        session: sorts by time within a subject.

    Raises:
        ShapeError: shapes, dtypes or the rate do not fit.
    """

    samples: NDArray[np.float32]
    labels: NDArray[np.int16]
    rate_hz: float
    channels: tuple[Channel, ...]
    subject: str
    position: str
    device: str
    session: str

    def __post_init__(self) -> None:
        if self.samples.ndim != 2 or self.samples.dtype != np.float32:
            raise ShapeError(f"samples must be (T, C) float32, got {self.samples.dtype} {self.samples.shape}")
        if self.samples.shape[1] != len(self.channels):
            raise ShapeError(f"{self.samples.shape[1]} columns but {len(self.channels)} channels")
        if self.labels.shape != self.samples.shape[:1] or self.labels.dtype != np.int16:
            raise ShapeError(
                f"labels must be ({self.samples.shape[0]},) int16, got {self.labels.dtype} {self.labels.shape}"
            )
        if not self.rate_hz > 0:
            raise ShapeError(f"rate_hz must be positive, got {self.rate_hz}")


def save_recordings(path: Path, recordings: Sequence[Recording], label_names: Sequence[str]) -> None:
    """Write recordings as one ``.npz`` without pickled objects (atomically: the old file stays on failure)."""
    header = {
        "format": _FORMAT,
        "label_names": list(label_names),
        "recordings": [
            {
                "rate_hz": r.rate_hz,
                "channels": [[c.name, c.unit] for c in r.channels],
                "subject": r.subject,
                "position": r.position,
                "device": r.device,
                "session": r.session,
            }
            for r in recordings
        ],
    }
    arrays: dict[str, NDArray[np.generic]] = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    for index, recording in enumerate(recordings):
        arrays[f"samples_{index}"] = recording.samples
        arrays[f"labels_{index}"] = recording.labels
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def load_recordings(path: Path) -> tuple[tuple[Recording, ...], tuple[str, ...]]:
    """Read what :func:`save_recordings` wrote.

    Returns:
        The recordings, and the names of the label classes.

    Raises:
        DataError: the file is missing, truncated, of another format, or inconsistent.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            header = json.loads(bytes(file["header"]))
            if header["format"] != _FORMAT:
                raise DataError(f"{path}: expected format {_FORMAT}, got {header['format']!r}")
            recordings = tuple(
                Recording(
                    samples=file[f"samples_{index}"],
                    labels=file[f"labels_{index}"],
                    rate_hz=float(entry["rate_hz"]),
                    channels=tuple(Channel(*pair) for pair in entry["channels"]),
                    subject=entry["subject"],
                    position=entry["position"],
                    device=entry["device"],
                    session=entry["session"],
                )
                for index, entry in enumerate(header["recordings"])
            )
            return recordings, tuple(header["label_names"])
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such recording file") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, ShapeError) as error:
        raise DataError(f"{path}: not a readable recording file ({error}); write it again") from error
