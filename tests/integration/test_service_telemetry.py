"""Telemetry through a real broker into the database, and everything that must not get there."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from service_harness import Device, enrolled_device, running_service, service_settings, until
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.device_records import health_of, revoke_device, stream_counts
from wearfleet_protos.codec import MAX_PAYLOAD_BYTES, encode
from wearfleet_protos.messages import DeviceStatus, Health
from wearfleet_protos.topics import Topic, TopicKind

pytestmark = pytest.mark.broker


@pytest.fixture(params=["mosquitto", "embedded"])
async def fleet(request, tmp_path):
    """A service on each of our brokers, with one connected device."""
    settings = service_settings(tmp_path / "state", broker={"kind": request.param})
    async with running_service(settings) as service:
        anna = await enrolled_device(service)
        client = await asyncio.to_thread(anna.mqtt, tmp_path)
        state = open_state(settings)
        yield SimpleNamespace(
            service=service,
            settings=settings,
            anna=anna,
            client=client,
            state=state,
            folder=tmp_path,
            kind=request.param,
        )
        client.disconnect()
        client.loop_stop()
        state.database.close()


def counts(fleet, kind: str = "window") -> tuple[int, int, int]:
    with fleet.state.database.read() as connection:
        own = [c for c in stream_counts(connection, fleet.anna.device_id) if c.kind == kind]
    return sum(c.received for c in own), sum(c.duplicated for c in own), sum(c.lost for c in own)


def refused(fleet, reason: str) -> float:
    return fleet.service.metrics.rejected.labels(reason)._value.get()


async def publish(fleet, payloads, kind: TopicKind = TopicKind.WINDOW) -> None:
    infos = [fleet.client.publish(fleet.anna.topic(kind), payload, qos=1) for payload in payloads]
    await asyncio.to_thread(lambda: [info.wait_for_publish(10) for info in infos])


async def test_windows_and_predictions_are_stored_once_in_the_number_they_were_sent(fleet):
    windows = [encode(fleet.anna.window(n)) for n in range(50)]
    await publish(fleet, windows)
    await publish(fleet, windows[:5])
    await publish(fleet, [encode(fleet.anna.prediction(n)) for n in range(20)], TopicKind.PREDICTION)
    await until(lambda: counts(fleet) == (50, 5, 0) and counts(fleet, "prediction") == (20, 0, 0))
    with fleet.state.database.read() as connection:
        payload = connection.exec_driver_sql("select payload from windows where sequence = 7").scalar()
    assert payload == windows[7]


async def test_junk_oversized_and_foreign_messages_are_counted_and_harm_nothing(fleet):
    await publish(fleet, [b"junk", b"", encode(fleet.anna.window(0, "eve-0002"))])
    await publish(fleet, [encode(fleet.anna.window(1))], TopicKind.PREDICTION)
    await until(lambda: refused(fleet, "payload") == 3 and refused(fleet, "foreign") == 1)
    await publish(fleet, [encode(fleet.anna.window(0))])
    await until(lambda: counts(fleet) == (1, 0, 0))
    assert fleet.service._healthy


async def test_an_oversized_message_never_reaches_the_database(fleet):
    fleet.client.publish(fleet.anna.topic(TopicKind.WINDOW), b"\x00" * (MAX_PAYLOAD_BYTES + 1), qos=0)
    await publish(fleet, [encode(fleet.anna.window(0))])
    stored = fleet.service.metrics.messages.labels("window")
    await until(lambda: stored._value.get() == 1)  # counted after it was stored
    assert counts(fleet) == (1, 0, 0)


async def test_a_device_cannot_publish_or_listen_in_another_ones_name(fleet):
    eve = await enrolled_device(fleet.service, "eve")
    heard: list[str] = []
    client = await asyncio.to_thread(eve.mqtt, fleet.folder)
    client.on_message = lambda _c, _u, message: heard.append(message.topic)
    client.subscribe([("wearfleet/v1/#", 1), (fleet.anna.topic(TopicKind.WINDOW), 1)])
    window = encode(eve.window(0, fleet.anna.device_id))
    client.publish(fleet.anna.topic(TopicKind.WINDOW), window, qos=1)
    client.publish(str(Topic("other", eve.device_id, TopicKind.WINDOW)), encode(eve.window(0)), qos=1)
    await publish(fleet, [encode(fleet.anna.window(n)) for n in range(3)])
    await until(lambda: counts(fleet) == (3, 0, 0))
    await asyncio.sleep(0.2)
    assert counts(fleet) == (3, 0, 0)
    assert heard == []
    client.disconnect()
    client.loop_stop()


async def test_a_revoked_device_is_not_heard_any_more(fleet):
    await publish(fleet, [encode(fleet.anna.window(0))])
    await until(lambda: counts(fleet) == (1, 0, 0))
    await until(lambda: fleet.service.metrics.devices._value.get() == 1)
    with fleet.state.database.write() as connection:
        revoke_device(connection, fleet.anna.device_id, 1)
    await until(lambda: fleet.service.metrics.devices._value.get() == 0)
    for number in range(1, 4):
        fleet.client.publish(fleet.anna.topic(TopicKind.WINDOW), encode(fleet.anna.window(number)), qos=1)
    await asyncio.sleep(0.5)
    assert counts(fleet) == (1, 0, 0)


async def test_a_late_last_will_does_not_end_a_newer_session(fleet):
    def status(boot: str, online: bool) -> bytes:
        fleet.anna.boot_id = boot
        return encode(DeviceStatus(fleet.anna.header(0), online, "birth" if online else "will", "1"))

    def online() -> object:
        with fleet.state.database.read() as connection:
            return health_of(connection, fleet.anna.device_id).get("online")

    await publish(fleet, [status("aaaaaaaa", True)], TopicKind.STATUS)
    await until(lambda: online() is True)
    await publish(fleet, [status("bbbbbbbb", True), status("aaaaaaaa", False)], TopicKind.STATUS)
    fleet.anna.boot_id = "bbbbbbbb"
    health = Health(fleet.anna.header(0), 1.5, 100, 7, 2, 3, 4.0, 5.0, "", 1)
    await publish(fleet, [encode(health)], TopicKind.HEALTH)
    await until(lambda: fleet.service.live.device(fleet.anna.device_id).outbox_depth == 7)
    assert online() is True
    assert fleet.service.live.device(fleet.anna.device_id).online
    await publish(fleet, [status("bbbbbbbb", False)], TopicKind.STATUS)
    await until(lambda: online() is False)


async def test_a_message_that_only_the_database_refuses_does_not_stop_the_others(fleet):
    bad = encode(fleet.anna.prediction(0, model_digest="nul \x00 is fine for SQLite"))
    await publish(fleet, [bad, encode(fleet.anna.prediction(1))], TopicKind.PREDICTION)
    await until(lambda: counts(fleet, "prediction")[0] == 2)


async def test_what_comes_while_the_service_is_away_is_stored_when_it_is_back(tmp_path):
    settings = service_settings(tmp_path / "state", broker={"kind": "mosquitto"})
    async with running_service(settings) as service:
        anna: Device = await enrolled_device(service)
    # Mosquitto is stopped with the service; the queue of its session is on disk, and a device sends again later
    async with running_service(settings):
        client = await asyncio.to_thread(anna.mqtt, tmp_path)
        infos = [
            client.publish(anna.topic(TopicKind.WINDOW), encode(anna.window(n)), qos=1) for n in range(30)
        ]
        await asyncio.to_thread(lambda: [info.wait_for_publish(10) for info in infos])
        state = open_state(settings)

        def received() -> int:
            with state.database.read() as connection:
                return sum(c.received for c in stream_counts(connection))

        await until(lambda: received() == 30)
        client.disconnect()
        client.loop_stop()
        state.database.close()
