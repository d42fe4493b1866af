"""A lasting MQTT session that acknowledges a message only when it is told to.

paho-mqtt is used directly, in its own thread, because it can leave the acknowledgement to the application: a message
that was not committed is delivered again after a crash. (aiomqtt acknowledges before the program sees a message.)
"""

import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode
from wearfleet_protos.errors import TransportError

__all__ = ["BrokerEndpoint", "Delivery", "MqttSession"]

_LOGGER: Final = logging.getLogger(__name__)
_KEEPALIVE_S: Final = 30
_FIRST_RETRY_S: Final = 0.5
_LONGEST_RETRY_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class BrokerEndpoint:
    """Where a broker listens; ``tls`` is None for a plain connection."""

    host: str
    port: int
    tls: ssl.SSLContext | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message; ``epoch`` tells which connection it came on, ``mid`` its number there (QoS 0 has none)."""

    topic: str
    payload: bytes
    qos: int
    mid: int
    epoch: int
    received_ns: int


class MqttSession:
    """Connects, subscribes, reconnects with jitter, and hands every message to a function.

    Args:
        endpoint: the broker.
        client_id: name of the lasting session.
        patterns: what to subscribe to, with QoS 1.
        on_delivery: called in the network thread; must be quick.
        on_connected: called in the network thread with True after subscribing and with False after a loss.
    """

    def __init__(
        self,
        endpoint: BrokerEndpoint,
        client_id: str,
        patterns: Sequence[str],
        on_delivery: Callable[[Delivery], None],
        on_connected: Callable[[bool], None],
    ) -> None:
        self._endpoint, self._patterns = endpoint, tuple(patterns)
        self._on_delivery, self._on_connected = on_delivery, on_connected
        self._epoch = 0
        self._trouble = "not tried yet"
        self._stopping, self._lost, self._subscribed = threading.Event(), threading.Event(), threading.Event()
        self._client_id = client_id
        self._client = self._make_client()
        self._thread = threading.Thread(target=self._keep_connected, name="mqtt-session", daemon=True)

    def start(self, timeout_s: float) -> None:
        """Connect and subscribe.

        Raises:
            TransportError: the broker did not answer in time.
        """
        self._thread.start()
        if not self._subscribed.wait(timeout_s):
            self.stop()
            where = f"{self._endpoint.host}:{self._endpoint.port}"
            raise TransportError(
                f"no answer from the MQTT broker at {where} within {timeout_s:g} s: {self._trouble}"
            )

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Tell the broker that it can forget these messages; those of an earlier connection come again."""
        for delivery in deliveries:
            if delivery.qos == 1 and delivery.epoch == self._epoch:
                self._client.ack(delivery.mid, delivery.qos)

    def stop(self) -> None:
        """Disconnect; the broker keeps the session and what is not acknowledged."""
        self._stopping.set()
        self._client.disconnect()
        self._lost.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _keep_connected(self) -> None:
        delay = _FIRST_RETRY_S
        while not self._stopping.is_set():
            self._lost.clear()
            began = time.monotonic()
            self._client = self._make_client()  # a used one would leak the sockets of its loop
            try:
                self._client.connect(self._endpoint.host, self._endpoint.port, _KEEPALIVE_S)
            except (OSError, ValueError) as error:
                self._trouble = str(error)
            else:
                self._client.loop_start()
                while not self._lost.wait(1.0) and not self._stopping.is_set():
                    pass
                self._client.loop_stop()
            delay = _FIRST_RETRY_S if time.monotonic() - began > _LONGEST_RETRY_S else delay
            self._stopping.wait(random.uniform(0.0, delay))  # noqa: S311 - jitter, not a secret
            delay = min(2 * delay, _LONGEST_RETRY_S)

    def _make_client(self) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=False,
            protocol=mqtt.MQTTv311,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        if self._endpoint.tls is not None:
            client.tls_set_context(self._endpoint.tls)
        client.on_connect = self._connected
        client.on_subscribe = self._subscription_answered
        client.on_disconnect = self._disconnected
        client.on_message = self._message
        return client

    def _connected(self, client: mqtt.Client, _: Any, __: Any, reason: ReasonCode, ___: Any) -> None:
        if reason.is_failure:
            self._trouble = f"the broker refused the service: {reason}"
            _LOGGER.warning("%s", self._trouble)
            self._lost.set()
            return
        self._epoch += 1
        client.subscribe([(pattern, 1) for pattern in self._patterns])

    def _subscription_answered(
        self, _: mqtt.Client, __: Any, ___: int, reasons: list[ReasonCode], ____: Any
    ) -> None:
        if any(reason.is_failure for reason in reasons):
            self._trouble = "the broker refused the subscription; check its access list"
            _LOGGER.error("%s", self._trouble)
            return
        self._subscribed.set()
        self._on_connected(True)

    def _disconnected(self, _: mqtt.Client, __: Any, ___: Any, reason: ReasonCode, ____: Any) -> None:
        self._trouble = f"connection lost: {reason}"
        if not self._stopping.is_set():
            _LOGGER.warning("broker: %s", self._trouble)
        self._on_connected(False)
        self._lost.set()

    def _message(self, _: mqtt.Client, __: Any, message: mqtt.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""  # refused later, with every other unknown topic
        self._on_delivery(
            Delivery(topic, bytes(message.payload), message.qos, message.mid, self._epoch, time.time_ns())
        )
