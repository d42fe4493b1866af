"""What the agent says about itself: the file ``status.json`` and the health message."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wearfleet_protos.codec import encode
from wearfleet_protos.messages import Health
from wearfleet_protos.topics import TopicKind

from wearfleet_edge.memory import private_bytes, resident_bytes

if TYPE_CHECKING:
    from wearfleet_edge.federated import Progress
    from wearfleet_edge.models import ActiveModel
    from wearfleet_edge.outbox import MakePayload, Outbox
    from wearfleet_edge.pipeline import HeaderFactory
    from wearfleet_edge.runtime import Evaluation
    from wearfleet_edge.scores import Scores
    from wearfleet_edge.streaming import StreamStatistics
    from wearfleet_edge.transport.mqtt import MqttLink

__all__ = ["StatusSource", "health_entry", "make_status"]


@dataclass(frozen=True, slots=True)
class StatusSource:
    """The parts that are asked."""

    device_id: str
    agent_version: str
    boot_id: str
    uptime_s: float
    active: ActiveModel
    outbox: Outbox
    stream: StreamStatistics
    link: MqttLink
    federation: Progress
    bytes_down: int
    scores: Scores
    refusal: str
    clock_error_s: float


def make_status(source: StatusSource, *, running: bool) -> dict[str, object]:
    """The content of ``status.json``; message counts are since enrolment, all others since the agent's start."""
    return {
        "device": source.device_id,
        "agent_version": source.agent_version,
        "boot_id": source.boot_id,
        "running": running,
        "uptime_s": round(source.uptime_s, 3),
        "rss_mb": round(resident_bytes() / 1e6, 1),
        "private_mb": round(private_bytes() / 1e6, 1),
        "torch_imported": "torch" in sys.modules,
        "clock_error_s": round(source.clock_error_s, 3),
        **_stream_status(source),
        **_model_status(source),
        **_link_status(source),
        **_federation_status(source),
    }


def _stream_status(source: StatusSource) -> dict[str, object]:
    outbox, stream = source.outbox.summary(), source.stream
    return {
        "stream_finished": stream.finished,
        "windows_recognised": stream.windows,
        "windows_out_of_distribution": stream.out_of_distribution,
        "chunks_refused": stream.chunks_refused,
        "windows_sent": outbox.appended.get(TopicKind.PREDICTION, 0),
        "windows_acknowledged": outbox.acknowledged(TopicKind.PREDICTION),
        "windows_lost": outbox.lost.get(TopicKind.PREDICTION, 0),
        "raw_windows_sent": outbox.appended.get(TopicKind.WINDOW, 0),
        "raw_windows_acknowledged": outbox.acknowledged(TopicKind.WINDOW),
        "messages_lost": sum(outbox.lost.values()),
        "outbox_depth": outbox.depth,
        "inference_ms_p50": round(stream.inference.quantile_us(0.50) / 1e3, 6),
        "inference_ms_p99": round(stream.inference.quantile_us(0.99) / 1e3, 6),
        "confusion_stream": stream.confusion.tolist(),
    }


def _model_status(source: StatusSource) -> dict[str, object]:
    installed = source.active.installed
    before, after = _accuracies(source) if installed else (None, None)
    return {
        "model_digest": installed.manifest.digest if installed else "",
        "model_version": installed.manifest.version if installed else 0,
        "model_refusal": source.refusal,
        "labels": list(installed.manifest.contract.labels) if installed else [],
        "personalised": installed is not None and source.active.recogniser.personalised,
        "accuracy_before": before.accuracy if before else None,
        "accuracy_after": after.accuracy if after else None,
        "holdout_windows": before.count if before else 0,
        "confusion_before": before.confusion.tolist() if before else [],
        "confusion_after": after.confusion.tolist() if after else [],
    }


def _link_status(source: StatusSource) -> dict[str, object]:
    link = source.link
    return {
        "broker_connected": link.connected,
        "broker_protocol": link.protocol if link.connected else "",
        "broker_error": link.last_error,
    }


def _federation_status(source: StatusSource) -> dict[str, object]:
    federation = source.federation
    return {
        "federated_rounds": federation.rounds,
        "federated_last_round": federation.last_round,
        "federated_declined": federation.declined,
        "federated_error": federation.last_error,
        "federated_train_seconds": round(federation.train_seconds, 3),
        "federated_bytes_down": source.bytes_down,
        "federated_bytes_up": federation.bytes_up,
    }


def health_entry(source: StatusSource, headers: HeaderFactory) -> tuple[str, MakePayload]:
    """A health message for the outbox."""
    installed = source.active.installed

    def make(sequence: int) -> bytes:
        return encode(
            Health(
                header=headers.make(sequence, headers.trace_id()),
                uptime_s=source.uptime_s,
                rss_bytes=resident_bytes(),
                outbox_depth=source.outbox.depth,
                outbox_lost=lost,
                windows_total=source.stream.windows,
                inference_us_p50=source.stream.inference.quantile_us(0.50),
                inference_us_p99=source.stream.inference.quantile_us(0.99),
                model_digest=installed.manifest.digest if installed else "",
                model_version=installed.manifest.version if installed else 0,
            )
        )

    lost = source.outbox.lost()  # before the transaction in which the message is encoded
    return TopicKind.HEALTH, make


def _accuracies(source: StatusSource) -> tuple[Evaluation | None, Evaluation | None]:
    if not source.scores.measurable:
        return None, None
    return source.scores.base(), source.scores.personal()
