"""Pure part of the ingest: one MQTT message becomes rows and live values, or is refused with a reason."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from wearfleet_protos import codec
from wearfleet_protos.errors import DeniedError, ProtocolError
from wearfleet_protos.messages import DeviceStatus, Header, Health, Prediction, SensorWindow
from wearfleet_protos.topics import Topic, TopicKind, parse_topic

from wearfleet_cloud.service.directory import Directory
from wearfleet_cloud.storage.telemetry_records import Row, StreamKey, TelemetryBatch

__all__ = ["Arrival", "RefusalError", "add_to_batch", "decode_arrival"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that was understood: who sent it, what it says, its bytes, and when it came."""

    device_id: str
    message: SensorWindow | Prediction | Health | DeviceStatus
    payload: bytes
    received_ns: int


class RefusalError(ProtocolError):
    """A message that is not stored.

    Args:
        reason: ``topic``, ``foreign``, ``size`` or ``payload``: the label of the metric.
        message: what was wrong.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


Message = SensorWindow | Prediction | Health | DeviceStatus

_DECODERS: Final[Mapping[TopicKind, Callable[[bytes], Message]]] = {
    TopicKind.WINDOW: codec.decode_window,
    TopicKind.PREDICTION: codec.decode_prediction,
    TopicKind.HEALTH: codec.decode_health,
    TopicKind.STATUS: codec.decode_status,
}


def decode_arrival(topic_text: str, payload: bytes, received_ns: int, directory: Directory) -> Arrival:
    """Understand one message.

    Raises:
        RefusalError: an unknown topic, a device that is unknown, revoked, of another tenant or another one than the
            payload names, or a payload that is too large or not what the topic promises.
    """
    try:
        topic = parse_topic(topic_text)
    except ProtocolError as error:
        raise RefusalError("topic", str(error)) from error
    decode = _DECODERS.get(topic.kind) if isinstance(topic, Topic) else None
    if decode is None:
        raise RefusalError("topic", f"devices do not publish on {topic_text[:200]!r}")
    _check_sender(topic.tenant, topic.device, directory)
    if len(payload) > codec.MAX_PAYLOAD_BYTES:
        raise RefusalError(
            "size", f"{topic.device}: {len(payload)} bytes, at most {codec.MAX_PAYLOAD_BYTES} are accepted"
        )
    try:
        message = decode(payload)
    except ProtocolError as error:
        raise RefusalError("payload", f"{topic.device}: {error}") from error
    if message.header.device_id != topic.device:
        raise RefusalError(
            "foreign", f"{topic.device} sent a message in the name of {message.header.device_id}"
        )
    if isinstance(message, Health):
        _check_health(message)
    return Arrival(topic.device, message, payload, received_ns)


def _check_sender(tenant: str, device_id: str, directory: Directory) -> None:
    try:
        device = directory.active(device_id)
    except DeniedError as error:
        raise RefusalError("foreign", str(error)) from error
    if device.tenant != tenant:
        raise RefusalError("foreign", f"{device_id} belongs to tenant {device.tenant}, not {tenant}")


def _check_health(message: Health) -> None:
    floats = (message.uptime_s, message.inference_us_p50, message.inference_us_p99)
    if not all(math.isfinite(value) for value in floats):
        raise RefusalError("payload", f"{message.header.device_id}: the health report holds NaN or infinity")


def add_to_batch(batch: TelemetryBatch, arrival: Arrival) -> None:
    """Put a message into the batch of the next transaction."""
    message, header = arrival.message, arrival.message.header
    batch.seen_ns[arrival.device_id] = arrival.received_ns
    match message:
        case SensorWindow():
            row = _timing(header, message.sample_index, arrival.received_ns) | {"payload": arrival.payload}
            batch.rows["window"].append((_stream(header, "window"), row))
        case Prediction():
            row = _timing(header, message.sample_index, arrival.received_ns) | _prediction(message)
            batch.rows["prediction"].append((_stream(header, "prediction"), row))
        case Health():
            _merge_health(batch, arrival, _health(message))
        case DeviceStatus():
            _merge_health(batch, arrival, {"online": message.online})


def _merge_health(batch: TelemetryBatch, arrival: Arrival, values: Row) -> None:
    known = batch.health.get(arrival.device_id, {})
    common = {"received_ns": arrival.received_ns, "boot_id": arrival.message.header.boot_id}
    batch.health[arrival.device_id] = {**known, **common, **values}


def _stream(header: Header, kind: str) -> StreamKey:
    return header.device_id, header.boot_id, kind


def _timing(header: Header, sample_index: int, received_ns: int) -> Row:
    return {
        "sequence": header.sequence,
        "received_ns": received_ns,
        "sample_index": min(sample_index, 2**63 - 1),
        "wall_time_ns": header.wall_time_ns,
    }


def _prediction(message: Prediction) -> dict[str, Any]:
    return {
        "model_digest": message.model_digest[:80],
        "model_version": min(message.model_version, 2**31 - 1),
        "personalised": message.personalised,
        "label": message.label,
        "annotated_label": None
        if message.annotated_label is None
        else min(message.annotated_label, 2**31 - 1),
        "confidence": float(message.probabilities[message.label]),
        "ood_score": message.ood_score,
        "out_of_distribution": message.out_of_distribution,
        "inference_ns": min(message.inference_ns, 2**63 - 1),
        "probabilities": message.probabilities.astype("<f4").tobytes(),
    }


def _health(message: Health) -> Row:
    return {
        "online": True,
        "uptime_s": message.uptime_s,
        "rss_bytes": min(message.rss_bytes, 2**63 - 1),
        "outbox_depth": min(message.outbox_depth, 2**63 - 1),
        "outbox_lost": min(message.outbox_lost, 2**63 - 1),
        "windows_total": min(message.windows_total, 2**63 - 1),
        "inference_us_p50": message.inference_us_p50,
        "inference_us_p99": message.inference_us_p99,
    }
