"""The only place that converts telemetry between dataclasses and protobuf bytes.

Decoding never trusts its input: junk, oversized payloads, wrong lengths and values that are not finite raise
:class:`ProtocolError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeVar, overload

import numpy as np
from google.protobuf.message import DecodeError, Message

from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.messages import (
    ClockQuality,
    DeviceStatus,
    Header,
    Health,
    Prediction,
    SensorWindow,
)
from wearfleet_protos.v1 import telemetry_pb2 as pb

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "MAX_PAYLOAD_BYTES",
    "SCHEMA_VERSION",
    "decode_health",
    "decode_prediction",
    "decode_status",
    "decode_window",
    "encode",
]

MAX_PAYLOAD_BYTES: Final = 256 * 1024
"""Largest telemetry payload that is decoded, in bytes."""

SCHEMA_VERSION: Final = 1

M = TypeVar("M", bound=Message)


@overload
def encode(message: SensorWindow, encoding: Literal["int16", "float32"] = ...) -> bytes: ...
@overload
def encode(message: Prediction | Health | DeviceStatus) -> bytes: ...
def encode(
    message: SensorWindow | Prediction | Health | DeviceStatus,
    encoding: Literal["int16", "float32"] = "int16",
) -> bytes:
    """Protobuf bytes of a message.

    Args:
        message: what to send.
        encoding: of a window's samples; int16 loses at most half of 1/65534 of each channel's range.
    """
    if isinstance(message, SensorWindow):
        return _window_to_pb(message, encoding).SerializeToString(deterministic=True)
    if isinstance(message, Prediction):
        return _prediction_to_pb(message).SerializeToString(deterministic=True)
    if isinstance(message, Health):
        return _health_to_pb(message).SerializeToString(deterministic=True)
    return pb.DeviceStatus(
        header=_header_to_pb(message.header),
        online=message.online,
        reason=message.reason,
        agent_version=message.agent_version,
    ).SerializeToString(deterministic=True)


def decode_window(data: bytes) -> SensorWindow:
    """Parse a window.

    Raises:
        ProtocolError: says what is wrong.
    """
    message = _parse(pb.SensorWindow, data)
    return SensorWindow(
        header=_header_from_pb(message.header),
        sample_index=message.sample_index,
        rate_hz=message.rate_hz,
        samples=_samples_from_pb(message),
    )


def decode_prediction(data: bytes) -> Prediction:
    """Parse a prediction.

    Raises:
        ProtocolError: says what is wrong.
    """
    message = _parse(pb.Prediction, data)
    return Prediction(
        header=_header_from_pb(message.header),
        sample_index=message.sample_index,
        model_digest=message.model_digest,
        model_version=message.model_version,
        personalised=message.personalised,
        label=message.label,
        probabilities=np.array(message.probabilities, np.float32),
        ood_score=message.ood_score,
        out_of_distribution=message.out_of_distribution,
        inference_ns=message.inference_ns,
        annotated_label=message.annotated_label if message.HasField("annotated_label") else None,
    )


def decode_health(data: bytes) -> Health:
    """Parse a health report.

    Raises:
        ProtocolError: says what is wrong.
    """
    message = _parse(pb.Health, data)
    return Health(
        header=_header_from_pb(message.header),
        uptime_s=message.uptime_s,
        rss_bytes=message.rss_bytes,
        outbox_depth=message.outbox_depth,
        outbox_lost=message.outbox_lost,
        windows_total=message.windows_total,
        inference_us_p50=message.inference_us_p50,
        inference_us_p99=message.inference_us_p99,
        model_digest=message.model_digest,
        model_version=message.model_version,
    )


def decode_status(data: bytes) -> DeviceStatus:
    """Parse a birth message or last will.

    Raises:
        ProtocolError: says what is wrong.
    """
    message = _parse(pb.DeviceStatus, data)
    return DeviceStatus(
        header=_header_from_pb(message.header),
        online=message.online,
        reason=message.reason,
        agent_version=message.agent_version,
    )


def _parse(cls: type[M], data: bytes) -> M:
    if len(data) > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"payload has {len(data)} bytes, at most {MAX_PAYLOAD_BYTES} are accepted")
    try:
        return cls.FromString(bytes(data))
    except DecodeError as error:
        raise ProtocolError(f"payload is not a {cls.DESCRIPTOR.full_name}: {error}") from error


def _header_to_pb(header: Header) -> pb.TelemetryHeader:
    return pb.TelemetryHeader(
        schema_version=SCHEMA_VERSION,
        device_id=header.device_id,
        boot_id=header.boot_id,
        sequence=header.sequence,
        trace_id=header.trace_id,
        wall_time_ns=header.wall_time_ns,
        clock_quality=int(header.clock_quality),  # type: ignore[arg-type]
    )


def _header_from_pb(header: pb.TelemetryHeader) -> Header:
    if header.schema_version != SCHEMA_VERSION:
        raise ProtocolError(f"schema version must be {SCHEMA_VERSION}, got {header.schema_version}")
    try:
        quality = ClockQuality(header.clock_quality)
    except ValueError:
        quality = ClockQuality.UNSET  # a newer sender's value: trust the clock least
    return Header(
        device_id=header.device_id,
        boot_id=header.boot_id,
        sequence=header.sequence,
        trace_id=header.trace_id,
        wall_time_ns=header.wall_time_ns,
        clock_quality=quality,
    )


def _window_to_pb(window: SensorWindow, encoding: Literal["int16", "float32"]) -> pb.SensorWindow:
    channels, samples = window.samples.shape
    message = pb.SensorWindow(
        header=_header_to_pb(window.header),
        sample_index=window.sample_index,
        rate_hz=window.rate_hz,
        channels=channels,
        samples=samples,
    )
    if encoding == "float32":
        message.float32.data = np.ascontiguousarray(window.samples, "<f4").tobytes()
        return message
    low = window.samples.min(axis=1).astype(np.float64)
    high = window.samples.max(axis=1).astype(np.float64)
    offset = ((low + high) / 2).astype(np.float32)
    reach = np.maximum(high - offset, offset - low)  # of the rounded offset, so that no value overflows
    scale = np.maximum(reach / 32767.0, np.finfo(np.float32).tiny).astype(np.float32)
    steps = np.rint((window.samples - offset[:, None].astype(np.float64)) / scale[:, None].astype(np.float64))
    message.int16.data = np.clip(steps, -32768, 32767).astype("<i2").tobytes()
    message.int16.scale.extend(scale.tolist())
    message.int16.offset.extend(offset.tolist())
    return message


def _samples_from_pb(message: pb.SensorWindow) -> NDArray[np.float32]:
    channels, samples = message.channels, message.samples
    which = message.WhichOneof("encoding")
    if which is None:
        raise ProtocolError("the window has no samples")
    data = message.int16.data if which == "int16" else message.float32.data
    expected = channels * samples * (2 if which == "int16" else 4)
    if len(data) != expected or expected == 0:
        raise ProtocolError(
            f"{channels} x {samples} {which} samples need {expected} bytes (more than 0), got {len(data)}"
        )
    if which == "float32":
        return np.frombuffer(data, "<f4").reshape(channels, samples).astype(np.float32)
    scale, offset = message.int16.scale, message.int16.offset
    if len(scale) != channels or len(offset) != channels:
        raise ProtocolError(f"expected {channels} scales and offsets, got {len(scale)} and {len(offset)}")
    values = np.frombuffer(data, "<i2").reshape(channels, samples).astype(np.float32)
    return values * np.array(scale, np.float32)[:, None] + np.array(offset, np.float32)[:, None]


def _prediction_to_pb(prediction: Prediction) -> pb.Prediction:
    message = pb.Prediction(
        header=_header_to_pb(prediction.header),
        sample_index=prediction.sample_index,
        model_digest=prediction.model_digest,
        model_version=prediction.model_version,
        personalised=prediction.personalised,
        label=prediction.label,
        probabilities=prediction.probabilities.tolist(),
        ood_score=prediction.ood_score,
        out_of_distribution=prediction.out_of_distribution,
        inference_ns=prediction.inference_ns,
    )
    if prediction.annotated_label is not None:
        message.annotated_label = prediction.annotated_label
    return message


def _health_to_pb(health: Health) -> pb.Health:
    return pb.Health(
        header=_header_to_pb(health.header),
        uptime_s=health.uptime_s,
        rss_bytes=health.rss_bytes,
        outbox_depth=health.outbox_depth,
        outbox_lost=health.outbox_lost,
        windows_total=health.windows_total,
        inference_us_p50=health.inference_us_p50,
        inference_us_p99=health.inference_us_p99,
        model_digest=health.model_digest,
        model_version=health.model_version,
    )
