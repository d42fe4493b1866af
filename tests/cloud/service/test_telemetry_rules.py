"""What the ingest accepts, and what the generated access lists allow."""

from __future__ import annotations

import numpy as np
import pytest
from amqtt.contexts import Action
from wearfleet_cloud.fleet.identity import SERVICE_NAME
from wearfleet_cloud.service.embedded_broker import may
from wearfleet_cloud.service.mosquitto_files import DEVICE_WRITES, access_list
from wearfleet_cloud.service.telemetry import RefusalError, add_to_batch, decode_arrival
from wearfleet_cloud.storage.device_records import Device
from wearfleet_cloud.storage.telemetry_records import TelemetryBatch
from wearfleet_protos.codec import MAX_PAYLOAD_BYTES, encode
from wearfleet_protos.errors import DeniedError
from wearfleet_protos.messages import ClockQuality, Header, Health, SensorWindow
from wearfleet_protos.topics import Topic, TopicKind


class OneDevice:
    """A directory in which anna of tenant home is enrolled."""

    def active(self, device_id: str) -> Device:
        if device_id != "anna-0001":
            raise DeniedError(f"device {device_id} is not enrolled here")
        return Device("anna-0001", "home", "anna", None, 1, "ff", 2, "1", 1)


def header(device_id: str = "anna-0001") -> Header:
    return Header(device_id, "00112233", 5, "0" * 32, 9, ClockQuality.REPLAY)


def window(device_id: str = "anna-0001") -> bytes:
    return encode(SensorWindow(header(device_id), 40, 50.0, np.ones((2, 3), np.float32)))


def health(uptime: float) -> bytes:
    return encode(Health(header(), uptime, 1, 2, 3, 4, 5.0, 6.0, "", 1))


def topic(device: str = "anna-0001", tenant: str = "home", kind: TopicKind = TopicKind.WINDOW) -> str:
    return str(Topic(tenant, device, kind))


def test_a_good_window_becomes_a_row_of_its_stream():
    payload = window()
    arrival = decode_arrival(topic(), payload, 77, OneDevice())
    batch = TelemetryBatch()
    add_to_batch(batch, arrival)
    ((stream, row),) = batch.rows["window"]
    assert stream == ("anna-0001", "00112233", "window")
    assert row == {
        "sequence": 5, "received_ns": 77, "sample_index": 40, "wall_time_ns": 9, "payload": payload,
    }  # fmt: skip
    assert batch.seen_ns == {"anna-0001": 77}


@pytest.mark.parametrize(
    ("topic_text", "payload", "reason"),
    [
        ("", window(), "topic"),
        ("wearfleet/v1/home/anna-0001/tele/nonsense", window(), "topic"),
        ("wearfleet/v1/home/anna-0001/cmd/reboot", window(), "topic"),
        (topic(kind=TopicKind.DESIRED), window(), "topic"),
        (topic(device="eve-0002"), window("eve-0002"), "foreign"),
        (topic(tenant="work"), window(), "foreign"),
        (topic(), window("eve-0002"), "foreign"),
        (topic(), b"junk", "payload"),
        (topic(), b"", "payload"),
        (topic(kind=TopicKind.PREDICTION), window(), "payload"),
        (topic(), b"\x00" * (MAX_PAYLOAD_BYTES + 1), "size"),
        (topic(kind=TopicKind.HEALTH), health(float("nan")), "payload"),
        (topic(kind=TopicKind.HEALTH), health(float("inf")), "payload"),
    ],
)
def test_a_wrong_message_is_refused_with_its_reason(topic_text, payload, reason):
    with pytest.raises(RefusalError) as caught:
        decode_arrival(topic_text, payload, 1, OneDevice())
    assert caught.value.reason == reason


def test_any_bytes_are_refused_or_understood_but_never_break_the_ingest():
    generator = np.random.default_rng(3)
    good = bytearray(window())
    for _ in range(300):
        bad = good.copy()
        for place in generator.integers(0, len(bad), 3):
            bad[place] = generator.integers(0, 256)
        try:
            arrival = decode_arrival(topic(), bytes(bad), 1, OneDevice())
        except RefusalError:
            continue
        assert arrival.device_id == "anna-0001"


@pytest.mark.parametrize(
    ("user", "action", "rest", "allowed"),
    [
        ("anna-0001", Action.PUBLISH, "home/anna-0001/tele/window", True),
        ("anna-0001", Action.PUBLISH, "home/eve-0002/tele/window", False),
        ("anna-0001", Action.PUBLISH, "home/anna-0001/cmd/reboot", False),
        ("anna-0001", Action.PUBLISH, "home/anna-0001/state/desired", False),
        ("anna-0001", Action.SUBSCRIBE, "home/anna-0001/cmd/+", True),
        ("anna-0001", Action.RECEIVE, "home/anna-0001/cmd/reboot", True),
        ("anna-0001", Action.SUBSCRIBE, "home/+/tele/window", False),
        ("anna-0001", Action.SUBSCRIBE, "#", False),
        (SERVICE_NAME, Action.SUBSCRIBE, "+/+/tele/window", True),
    ],
)
def test_the_embedded_broker_binds_topics_to_the_certificate(user, action, rest, allowed):
    assert may(user, action, f"wearfleet/v1/{rest}") is allowed


def test_the_access_list_of_mosquitto_denies_a_revoked_device_everything():
    text = access_list(["eve-0002"])
    assert "user eve-0002\ntopic deny #\n" in text
    for kind in DEVICE_WRITES:
        assert f"pattern write wearfleet/v1/+/%u/{kind}\n" in text
    assert "%u" not in access_list([]).split("pattern")[0]
