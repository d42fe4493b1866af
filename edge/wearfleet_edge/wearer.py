"""What this device knows of its wearer: recordings with labels, brought to the form that a model wants."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from wearfleet_protos.errors import DataError
from wearfleet_protos.windowing import WindowSpec, split_by_time

from wearfleet_edge.sensors.replay import conform
from wearfleet_edge.trainer import TrainingData

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wearfleet_protos.plan import InputContract
    from wearfleet_protos.recording import Recording

__all__ = ["Wearer"]


class Wearer:
    """One person's recordings.

    Args:
        recordings: as recorded, in time order; may be empty.
        label_names: what their class indices mean.
        holdout_fraction: later share of each activity that is only ever used to measure.
    """

    def __init__(
        self, recordings: Sequence[Recording], label_names: Sequence[str], holdout_fraction: float
    ) -> None:
        self._recordings = tuple(recordings)
        self._label_names = tuple(label_names)
        self._holdout_fraction = holdout_fraction
        self._lock = threading.Lock()
        self._contract: InputContract | None = None
        self._conformed: tuple[Recording, ...] = ()
        self._split: TrainingData | None = None

    @property
    def has_recordings(self) -> bool:
        """False when the agent was started without a sensor."""
        return bool(self._recordings)

    def conformed(self, contract: InputContract) -> tuple[Recording, ...]:
        """The recordings with a model's channels, units, rate and classes.

        Raises:
            DataError: they do not have what the model needs.
        """
        with self._lock:
            self._prepare(contract)
            return self._conformed

    def training_data(self, contract: InputContract) -> TrainingData:
        """Labelled windows: the earlier part to learn from, the later part to measure.

        Raises:
            DataError: there are no recordings, or they do not have what the model needs.
        """
        if not self._recordings:
            raise DataError("this device has no recorded windows to learn from; start it with a recording")
        with self._lock:
            self._prepare(contract)
            if self._split is None:
                spec = WindowSpec(contract.window, contract.stride, contract.rate_hz)
                self._split = TrainingData(*split_by_time(self._conformed, spec, self._holdout_fraction))
            return self._split

    def _prepare(self, contract: InputContract) -> None:
        if contract != self._contract:
            self._conformed = conform(self._recordings, self._label_names, contract)
            self._contract, self._split = contract, None
