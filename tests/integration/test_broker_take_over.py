"""A service that comes back takes over the Mosquitto of its predecessor, and with it everything that waits there."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import signal
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

import paho.mqtt.client as paho
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion
from service_harness import signing_request, until
from wearfleet_cloud.config import load_settings
from wearfleet_cloud.fleet.identity import SERVICE_NAME, Authority
from wearfleet_cloud.service.broker import create_broker
from wearfleet_cloud.service.mqtt_session import Delivery, MqttSession

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from wearfleet_cloud.service.broker import Broker

pytestmark = pytest.mark.broker

TOPIC = "wearfleet/v1/default/anna-1f3a/tele/window"


class Place:
    """A state folder with an authority, and the service's and one device's way to its broker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder / "keys")
        now = dt.datetime.now(dt.UTC)
        self.files = self.authority.server_files(("127.0.0.1",), now)
        self.config = load_settings(None, {"broker": {"port": 0, "kind": "mosquitto"}}).broker
        self._device = folder / "device.pem"
        key = ec.generate_private_key(ec.SECP256R1())
        chain = self.authority.issue(signing_request(key), "anna-1f3a", "default", now).chain_pem
        pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
        self._device.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none) + chain)

    def broker(self) -> Broker:
        return create_broker(self.config, self.folder / "broker", "127.0.0.1", self.files)

    def subscribe(self, broker: Broker, on_delivery: Callable[[Delivery], None]) -> MqttSession:
        session = MqttSession(
            broker.endpoint, SERVICE_NAME, ["wearfleet/v1/+/+/tele/window"], on_delivery, ignore
        )
        session.start(10)
        return session

    def publish(self, broker: Broker, payload: bytes) -> None:
        """Publish as the device does; returns when the broker has acknowledged it."""
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id="anna-1f3a", clean_session=False)
        context = ssl.create_default_context(cafile=str(self.files.ca))
        context.load_cert_chain(self._device)
        client.tls_set_context(context)
        client.connect(broker.endpoint.host, broker.endpoint.port)
        client.loop_start()
        client.publish(TOPIC, payload, qos=1).wait_for_publish(10)
        client.disconnect()
        client.loop_stop()


def ignore(_: bool) -> None:
    """Nobody asks whether the session is connected."""


async def vanish(broker: Broker, session: MqttSession) -> None:
    """What a killed service leaves: a broker that nobody watches, and its session there."""
    await asyncio.to_thread(session.stop)
    broker._keeper.cancel()
    with suppress(asyncio.CancelledError):
        await broker._keeper


def end_mosquitto(folder: Path) -> None:
    with suppress(OSError, ValueError):
        os.kill(int((folder / "broker" / "mosquitto.pid").read_text()), signal.SIGTERM)


async def test_what_comes_between_the_take_over_and_the_services_return_is_not_lost(tmp_path: Path) -> None:
    place = Place(tmp_path)
    first = place.broker()
    try:
        await first.start()
        await vanish(first, place.subscribe(first, lambda _: None))
        await asyncio.to_thread(place.publish, first, b"while the service is away")
        second = place.broker()
        await second.start()
        assert second.endpoint.port == first.endpoint.port
        await asyncio.sleep(0.3)  # time in which Mosquitto would act on a signal
        await asyncio.to_thread(place.publish, second, b"after the take-over")
        came: list[bytes] = []
        session = place.subscribe(second, lambda delivery: came.append(delivery.payload))
        second.admit_devices()
        await asyncio.to_thread(place.publish, second, b"after the return")
        await until(lambda: len(came) >= 3)
        await asyncio.to_thread(session.stop)
        await second.stop()
        assert came == [b"while the service is away", b"after the take-over", b"after the return"]
    finally:
        end_mosquitto(tmp_path)


async def test_a_device_that_was_revoked_while_the_service_was_away_is_shut_out_at_its_return(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    first = place.broker()
    try:
        await first.start()
        await vanish(first, place.subscribe(first, lambda _: None))
        second = place.broker()
        second.revoke(("anna-1f3a",))
        await second.start()
        came: list[bytes] = []
        session = place.subscribe(second, lambda delivery: came.append(delivery.payload))
        second.admit_devices()
        await asyncio.sleep(0.3)
        with suppress(ValueError):
            await asyncio.to_thread(place.publish, second, b"from a revoked device")
        await asyncio.sleep(0.3)
        await asyncio.to_thread(session.stop)
        await second.stop()
        assert came == []
    finally:
        end_mosquitto(tmp_path)
