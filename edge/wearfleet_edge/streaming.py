"""The stream: samples in, recognised windows into the outbox."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import ShapeError

from wearfleet_edge.pipeline import HeaderFactory, Pipeline
from wearfleet_edge.runtime import Latency
from wearfleet_edge.sensors.replay import ReplaySensor, paced

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from wearfleet_protos.plan import InputContract

    from wearfleet_edge.config import SensorConfig
    from wearfleet_edge.models import ActiveModel
    from wearfleet_edge.outbox import Outbox
    from wearfleet_edge.pipeline import RecognisedWindow
    from wearfleet_edge.policy import SharingPolicy
    from wearfleet_edge.sensors.replay import Chunk
    from wearfleet_edge.wearer import Wearer

__all__ = ["StreamStatistics", "Streamer"]

_LOG = logging.getLogger(__name__)

_HIGH_WATER: Final = 10_000
"""Waiting messages above which a replay without a pace waits, so that recorded data is never dropped."""


class StreamStatistics:
    """Counts since the agent's start; written by the stream, read by anyone."""

    def __init__(self) -> None:
        self.windows = 0
        self.out_of_distribution = 0
        self.chunks_refused = 0
        self.finished = False
        self.inference = Latency()
        self.confusion: NDArray[np.int64] = np.zeros((0, 0), np.int64)

    def add(self, window: RecognisedWindow) -> None:
        """Count one recognised window."""
        said = window.recognition
        classes = len(said.probabilities)
        if self.confusion.shape[0] != classes:
            self.confusion = np.zeros((classes, classes), np.int64)
        if window.label is not None and window.label < classes:
            self.confusion[window.label, said.label] += 1
        self.windows += 1
        self.out_of_distribution += said.out_of_distribution
        self.inference.add(said.inference_ns)


class Streamer:
    """Plays a wearer's recordings through the model in use.

    Args:
        wearer: what is played.
        active: the model in use.
        outbox: where messages go.
        headers: makes message headers.
        policy: what may leave the device.
        sensor: speed and repetition.
        wait: waits the given seconds and tells whether to stop.
    """

    def __init__(
        self,
        *,
        wearer: Wearer,
        active: ActiveModel,
        outbox: Outbox,
        headers: HeaderFactory,
        policy: SharingPolicy,
        sensor: SensorConfig,
        wait: Callable[[float], bool],
    ) -> None:
        self._wearer = wearer
        self._active = active
        self._outbox = outbox
        self._headers = headers
        self._policy = policy
        self._sensor = sensor
        self._wait = wait
        self.statistics = StreamStatistics()

    def run(self) -> None:
        """Stream to the end of the recordings, or until the agent stops.

        Raises:
            DataError: the recordings do not have what the model needs.
        """
        seconds, samples = 0.0, 0
        while True:
            contract = self._active.recogniser.manifest.contract
            played, ended = self._play(contract, round(seconds * contract.rate_hz), samples)
            seconds, samples = seconds + played / contract.rate_hz, samples + played
            if ended:
                break
            _LOG.info("the new model wants other windows; the stream goes on with them")
        self.statistics.finished = True

    def _play(self, contract: InputContract, skip: int, first_sample: int) -> tuple[int, bool]:
        """Stream until the end (True) or until a model with another contract is in use; samples played."""
        sensor = ReplaySensor(self._wearer.conformed(contract), repeat=self._sensor.repeat)
        pipeline = Pipeline(lambda: self._active.recogniser, self._headers, self._policy, first_sample)
        played = 0
        for chunk in paced(
            sensor.chunks(skip),
            contract.rate_hz,
            self._sensor.speed,
            monotonic=time.monotonic,
            wait=self._wait,
        ):
            if self._active.recogniser.manifest.contract != contract:
                return played, False
            self._push(pipeline, chunk)
            played += len(chunk.samples)
            if self._sensor.speed == 0:
                self._hold_back()
        return played, True

    def _push(self, pipeline: Pipeline, chunk: Chunk) -> None:
        try:
            windows = pipeline.push(chunk)
        except ShapeError as error:
            self.statistics.chunks_refused += 1
            _LOG.warning("left out %d samples: %s", len(chunk.samples), error)
            return
        for window, messages in windows:
            self._outbox.append(messages)
            self.statistics.add(window)

    def _hold_back(self) -> None:
        while not self._outbox.wait_below(_HIGH_WATER, 0.2):
            if self._wait(0.0):
                return
