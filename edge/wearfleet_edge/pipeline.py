"""From samples to messages: cut windows, recognise, and say what to send. No input or output in here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from wearfleet_protos.codec import encode
from wearfleet_protos.labels import UNLABELLED
from wearfleet_protos.messages import ClockQuality, Header, Prediction, SensorWindow
from wearfleet_protos.topics import TopicKind
from wearfleet_protos.windowing import StreamWindower, WindowSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wearfleet_edge.outbox import MakePayload
    from wearfleet_edge.policy import SharingPolicy
    from wearfleet_edge.runtime import Recogniser, Recognition
    from wearfleet_edge.sensors.replay import Chunk

__all__ = ["HeaderFactory", "Pipeline", "RecognisedWindow"]


@dataclass(frozen=True, slots=True)
class HeaderFactory:
    """Makes the first part of every message.

    Args:
        device_id: this device.
        boot_id: this start.
        clock_quality: how far the clock can be trusted.
        clock_ns: wall clock.
        trace_id: a new W3C trace id.
    """

    device_id: str
    boot_id: str
    clock_quality: ClockQuality
    clock_ns: Callable[[], int]
    trace_id: Callable[[], str]

    def make(self, sequence: int, trace_id: str) -> Header:
        """A header with the present time."""
        return Header(self.device_id, self.boot_id, sequence, trace_id, self.clock_ns(), self.clock_quality)


@dataclass(frozen=True, slots=True, eq=False)
class RecognisedWindow:
    """One window with its recognition: ``samples`` (C, T) float32; ``label`` is stated, not recognised."""

    sample_index: int
    samples: NDArray[np.float32]
    label: int | None
    recognition: Recognition


class Pipeline:
    """Cuts a stream and recognises each window.

    Args:
        recogniser: gives the model to use for the next window.
        headers: makes message headers.
        policy: what may leave the device.
        first_sample: sample index at which this part of the stream begins.
    """

    def __init__(
        self,
        recogniser: Callable[[], Recogniser],
        headers: HeaderFactory,
        policy: SharingPolicy,
        first_sample: int = 0,
    ) -> None:
        self._recogniser = recogniser
        self._headers = headers
        self._policy = policy
        contract = recogniser().manifest.contract
        self._spec = WindowSpec(contract.window, contract.stride, contract.rate_hz)
        self._channels = len(contract.channels)
        self._labels: NDArray[np.int16]
        self._seen = first_sample  # samples since the stream's start
        self._restart()

    def push(self, chunk: Chunk) -> list[tuple[RecognisedWindow, list[tuple[str, MakePayload]]]]:
        """Take samples; return each window that became complete, with the messages to send for it.

        Raises:
            ShapeError: wrong number of channels, or a value that is not finite. The chunk is left out and a
                new window begins after it.
        """
        if chunk.first:
            self._restart()
        try:
            windows = self._windower.push(chunk.samples)
        except Exception:
            self._seen += len(chunk.samples)
            self._restart()
            raise
        self._labels = np.concatenate((self._labels, chunk.labels))
        self._seen += len(chunk.samples)
        recogniser = self._recogniser()
        done = []
        for start, samples in windows:
            window = RecognisedWindow(
                self._offset + start, samples, self._label_at(start), recogniser.recognise(samples)
            )
            done.append((window, self._messages(window, recogniser)))
        return done

    def _restart(self) -> None:
        self._windower = StreamWindower(self._spec, self._channels)
        self._offset = self._seen  # where the windower's sample 0 lies in the stream
        self._labels = np.empty(0, np.int16)
        self._labels_from = 0

    def _label_at(self, start: int) -> int | None:
        """The one class that all samples of the window carry, if so; forgets older labels."""
        self._labels = self._labels[start - self._labels_from :]
        self._labels_from = start
        part = self._labels[: self._spec.length]
        label = int(part[0])
        return label if label != UNLABELLED and bool((part == label).all()) else None

    def _messages(self, window: RecognisedWindow, recogniser: Recogniser) -> list[tuple[str, MakePayload]]:
        trace = self._headers.trace_id()
        manifest = recogniser.manifest
        said = window.recognition

        def prediction(sequence: int) -> bytes:
            return encode(
                Prediction(
                    header=self._headers.make(sequence, trace),
                    sample_index=window.sample_index,
                    model_digest=manifest.digest,
                    model_version=manifest.version,
                    personalised=recogniser.personalised,
                    label=said.label,
                    probabilities=said.probabilities,
                    ood_score=said.ood_score,
                    out_of_distribution=said.out_of_distribution,
                    inference_ns=said.inference_ns,
                    annotated_label=window.label if self._policy.annotations else None,
                )
            )

        def raw(sequence: int) -> bytes:
            header = self._headers.make(sequence, trace)
            return encode(SensorWindow(header, window.sample_index, self._spec.rate_hz, window.samples))

        messages: list[tuple[str, MakePayload]] = [(TopicKind.PREDICTION, prediction)]
        if self._policy.raw_windows:
            messages.append((TopicKind.WINDOW, raw))
        return messages
