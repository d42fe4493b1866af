"""The windows of a data set with everything that is known about each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from wearfleet_protos.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["WindowSet"]


@dataclass(frozen=True, slots=True, eq=False)
class WindowSet:
    """N labelled windows and their origin; all arrays have N rows.

    Args:
        x: (N, C, T) float32 in canonical units, may be a read-only memory map.
        activity: (N,) int64 class.
        subject: (N,) str wearer.
        position: (N,) str place on the body.
        device: (N,) str sensor.
        session: (N,) str, sorts by time within a subject.
        recording: (N,) int64 number of the recording it was cut from.
        start: (N,) int64 first sample within that recording.

    Raises:
        ShapeError: the arrays differ in length, or ``x`` is not (N, C, T).
    """

    x: NDArray[np.float32]
    activity: NDArray[np.int64]
    subject: NDArray[np.str_]
    position: NDArray[np.str_]
    device: NDArray[np.str_]
    session: NDArray[np.str_]
    recording: NDArray[np.int64]
    start: NDArray[np.int64]

    def __post_init__(self) -> None:
        origins = (
            self.activity,
            self.subject,
            self.position,
            self.device,
            self.session,
            self.recording,
            self.start,
        )
        if self.x.ndim != 3 or any(column.shape != self.x.shape[:1] for column in origins):
            raise ShapeError(
                f"expected x (N, C, T) and seven columns (N,), got {self.x.shape} and {[c.shape for c in origins]}"
            )

    def __len__(self) -> int:
        return int(self.x.shape[0])

    @property
    def length(self) -> int:
        """T, samples a window."""
        return int(self.x.shape[2])

    def subjects(self) -> tuple[str, ...]:
        """Every wearer, sorted."""
        return tuple(str(subject) for subject in np.unique(self.subject))

    def of_subjects(self, subjects: tuple[str, ...]) -> NDArray[np.int64]:
        """Positions of the windows of these wearers, ascending."""
        return np.flatnonzero(np.isin(self.subject, np.asarray(subjects, np.str_)))
