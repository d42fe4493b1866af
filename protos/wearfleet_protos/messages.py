"""Telemetry as frozen dataclasses; :mod:`wearfleet_protos.codec` converts them from and to bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import numpy as np

from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.topics import check_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ClockQuality", "DeviceStatus", "Header", "Health", "Prediction", "SensorWindow"]

_BOOT: Final = re.compile(r"[0-9a-f]{8,32}")
_TRACE: Final = re.compile(r"[0-9a-f]{32}")
_MAX_CHANNELS: Final = 256
_MAX_SAMPLES: Final = 16_384


class ClockQuality(IntEnum):
    """How far a wall-clock time can be trusted."""

    UNSET = 1
    HOLDOVER = 2
    SYNCHRONISED = 3
    REPLAY = 4


@dataclass(frozen=True, slots=True)
class Header:
    """First part of every telemetry message.

    Args:
        device_id: the sender's claim; must equal the topic's device.
        boot_id: random identity of this start of the agent, 8 to 32 hexadecimal digits.
        sequence: counts from 0 within a boot and message kind, without gaps.
        trace_id: W3C trace id, 32 hexadecimal digits.
        wall_time_ns: nanoseconds since 1970 UTC.
        clock_quality: how far that time can be trusted.
    """

    device_id: str
    boot_id: str
    sequence: int
    trace_id: str
    wall_time_ns: int
    clock_quality: ClockQuality

    def __post_init__(self) -> None:
        check_name(self.device_id, "device_id")
        if not _BOOT.fullmatch(self.boot_id):
            raise ProtocolError(f"boot_id must be 8 to 32 hexadecimal digits, got {self.boot_id[:40]!r}")
        if not _TRACE.fullmatch(self.trace_id):
            raise ProtocolError(f"trace_id must be 32 hexadecimal digits, got {self.trace_id[:40]!r}")
        if not 0 <= self.sequence < 2**63 or not 0 <= self.wall_time_ns < 2**63:
            raise ProtocolError("sequence and wall_time_ns must be non-negative 63-bit integers")


@dataclass(frozen=True, slots=True, eq=False)
class SensorWindow:
    """One window: ``samples`` (C, T) float32, finite, in the channels' canonical units."""

    header: Header
    sample_index: int
    rate_hz: float
    samples: NDArray[np.float32]

    def __post_init__(self) -> None:
        shape = self.samples.shape
        if self.samples.ndim != 2 or not 1 <= shape[0] <= _MAX_CHANNELS or not 1 <= shape[1] <= _MAX_SAMPLES:
            raise ProtocolError(
                f"a window must be (C, T), C up to {_MAX_CHANNELS}, T up to {_MAX_SAMPLES}, got {shape}"
            )
        if not bool(np.isfinite(self.samples).all()):
            raise ProtocolError("the window holds NaN or infinity")
        if not (self.rate_hz > 0 and np.isfinite(self.rate_hz)):
            raise ProtocolError(f"rate_hz must be positive, got {self.rate_hz}")


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What a model said about one window: ``probabilities`` (K,) float32; times in nanoseconds."""

    header: Header
    sample_index: int
    model_digest: str
    model_version: int
    personalised: bool
    label: int
    probabilities: NDArray[np.float32]
    ood_score: float
    out_of_distribution: bool
    inference_ns: int
    annotated_label: int | None = None

    def __post_init__(self) -> None:
        count = self.probabilities.shape[0] if self.probabilities.ndim == 1 else 0
        if not 1 <= count <= 1024 or not 0 <= self.label < count:
            raise ProtocolError(
                f"label {self.label} does not fit probabilities of shape {self.probabilities.shape}"
            )
        if not bool(np.isfinite(self.probabilities).all()) or not np.isfinite(self.ood_score):
            raise ProtocolError("the prediction holds NaN or infinity")
        if abs(float(self.probabilities.sum(dtype=np.float64)) - 1.0) > 1e-3:
            raise ProtocolError("the probabilities do not sum to 1")


@dataclass(frozen=True, slots=True)
class Health:
    """How a device is doing; see ``telemetry.proto`` for the units."""

    header: Header
    uptime_s: float
    rss_bytes: int
    outbox_depth: int
    outbox_lost: int
    windows_total: int
    inference_us_p50: float
    inference_us_p99: float
    model_digest: str
    model_version: int


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """Birth message, clean stop, or last will."""

    header: Header
    online: bool
    reason: str
    agent_version: str
