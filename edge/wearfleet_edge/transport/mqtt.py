"""Telemetry over MQTT: drains the outbox, at most 20 messages under way, each deleted by its acknowledgement.

Every connection is a fresh client, so nothing waits inside the MQTT library: what was not acknowledged is still in
the outbox and is sent again, oldest first. MQTT 5 where the broker offers it, 3.1.1 otherwise.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from wearfleet_protos.codec import encode
from wearfleet_protos.errors import ConfigError, TransportError, WearfleetError
from wearfleet_protos.messages import DeviceStatus
from wearfleet_protos.topics import Topic, TopicKind

if TYPE_CHECKING:
    from pathlib import Path

    from wearfleet_edge.identity import Broker
    from wearfleet_edge.outbox import Outbox
    from wearfleet_edge.pipeline import HeaderFactory
    from wearfleet_edge.transport.backoff import Backoff

__all__ = ["MAX_IN_FLIGHT", "MqttLink", "Session", "device_tls"]

_LOG = logging.getLogger(__name__)

MAX_IN_FLIGHT: Final = 20
_CONNECT_SECONDS: Final = 10.0
_MODERN_ANSWER_SECONDS: Final = 3.0
"""Some brokers of 3.1.1 leave a CONNECT of version 5 without an answer; then the older version is tried."""
_KEEPALIVE_SECONDS: Final = 30
_IDLE_SECONDS: Final = 0.5
_STABLE_SECONDS: Final = 10.0
_NEVER_ACCEPTED: Final = frozenset({0x90, 0x95, 0x99})
"""Reason codes after which sending the same bytes again is useless: topic name, size, payload format."""
_CONTENT: Final = {
    TopicKind.WINDOW: "wearfleet.v1.SensorWindow",
    TopicKind.PREDICTION: "wearfleet.v1.Prediction",
    TopicKind.HEALTH: "wearfleet.v1.Health",
    TopicKind.STATUS: "wearfleet.v1.DeviceStatus",
}


@dataclass(frozen=True, slots=True)
class Session:
    """Who connects, and where.

    Args:
        tenant: of the device.
        device_id: of the device; also the client id.
        broker: host, port and whether it wants TLS.
        tls: context with the device's certificate; None without TLS.
        agent_version: goes into the birth message.
    """

    tenant: str
    device_id: str
    broker: Broker
    tls: Callable[[], ssl.SSLContext] | None
    agent_version: str


def device_tls(authority: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS with the device's certificate, trusting only the fleet's authority.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    try:
        context = ssl.create_default_context(cafile=str(authority))
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the device's identity cannot be loaded ({error}); enrol again") from error
    return context


class _Outcome(Enum):
    """Why a connection attempt did not succeed."""

    CONNECTED = "connected"
    CLOSED = "closed without an answer"
    WRONG_VERSION = "the broker does not speak this version of MQTT"
    REFUSED = "refused"


class MqttLink:
    """Keeps one device connected and its outbox drained.

    Args:
        session: who and where.
        outbox: what to send.
        headers: makes the headers of status messages.
        backoff: delays between connections.
    """

    def __init__(self, session: Session, outbox: Outbox, headers: HeaderFactory, backoff: Backoff) -> None:
        self._session = session
        self._outbox = outbox
        self._headers = headers
        self._backoff = backoff
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._version = MQTTProtocolVersion.MQTTv5
        self._connections = 0
        self._failures = 0
        self.connected = False
        self.last_error = ""

    @property
    def protocol(self) -> str:
        """Version of MQTT of the last connection."""
        return "5" if self._version is MQTTProtocolVersion.MQTTv5 else "3.1.1"

    def start(self) -> None:
        """Connect, and connect again, until :meth:`stop`."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Send what is under way to its end, say goodbye, disconnect."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            connection = _Connection(
                self._session, self._outbox, self._headers, self._version, self._connections
            )
            self._connections += 1
            try:
                outcome = connection.open()
                if outcome is _Outcome.CONNECTED:
                    self._serve(connection)
                else:
                    self._refused(connection, outcome)
            except WearfleetError as error:
                self._failed(str(error))
            finally:
                self.connected = False
                connection.close()
                self._outbox.release_all()
            self._stop.wait(self._backoff.delay(max(self._failures, 1)) if not self._stop.is_set() else 0.0)

    def _serve(self, connection: _Connection) -> None:
        self.connected = True
        self.last_error = ""
        _LOG.info("connected to the broker with MQTT %s", self.protocol)
        seconds = connection.drain(self._stop)
        if self._stop.is_set():
            connection.say_goodbye()
        else:
            self._failures = 0 if seconds > _STABLE_SECONDS else self._failures
            self._failed(connection.reason or "the broker closed the connection")

    def _refused(self, connection: _Connection, outcome: _Outcome) -> None:
        if outcome in (_Outcome.WRONG_VERSION, _Outcome.CLOSED):
            modern = self._version is MQTTProtocolVersion.MQTTv5
            self._version = MQTTProtocolVersion.MQTTv311 if modern else MQTTProtocolVersion.MQTTv5
        self._failed(f"{outcome.value}: {connection.reason}" if connection.reason else outcome.value)

    def _failed(self, message: str) -> None:
        self._failures += 1
        self.last_error = message
        broker = self._session.broker
        _LOG.warning("no broker at %s:%d: %s", broker.host, broker.port, message)


class _Connection:
    """One connection to the broker, from CONNECT to its end."""

    def __init__(
        self,
        session: Session,
        outbox: Outbox,
        headers: HeaderFactory,
        version: MQTTProtocolVersion,
        number: int,
    ) -> None:
        self._session = session
        self._outbox = outbox
        self._headers = headers
        self._number = number
        self._modern = version is MQTTProtocolVersion.MQTTv5
        self._trace = headers.trace_id()
        self._topics = {kind: str(Topic(session.tenant, session.device_id, kind)) for kind in _CONTENT}
        self._properties = {
            kind: _properties(schema) if self._modern else None for kind, schema in _CONTENT.items()
        }
        self._changed = threading.Condition()
        self._under_way: dict[int, int | None] = {}  # MQTT message id -> outbox row, None for a status
        self._early: dict[int, int | None] = {}  # acknowledged before publish() returned -> reason code
        self._answer: _Outcome | None = None
        self._ended = False
        self.reason = ""
        self._client = self._make_client(version)

    def open(self) -> _Outcome:
        """Connect and wait for the broker's answer.

        Raises:
            TransportError: nobody listens there, or TLS failed.
        """
        broker = self._session.broker
        if broker.tls and self._session.tls is not None:
            self._client.tls_set_context(self._session.tls())
        clean: dict[str, Any] = {"clean_start": True} if self._modern else {}
        try:
            self._client.connect(broker.host, broker.port, keepalive=_KEEPALIVE_SECONDS, **clean)
        except ssl.SSLCertVerificationError as error:
            raise TransportError(
                f"the broker's certificate is not trusted ({error.verify_message})"
            ) from error
        except (OSError, ValueError) as error:
            raise TransportError(f"cannot connect ({error})") from error
        self._client.loop_start()
        with self._changed:
            patience = _MODERN_ANSWER_SECONDS if self._modern else _CONNECT_SECONDS
            self._changed.wait_for(lambda: self._answer is not None or self._ended, patience)
            return self._answer or _Outcome.CLOSED

    def drain(self, stop: threading.Event) -> float:
        """Say that the device is there, then send until the connection ends or ``stop``; returns its seconds."""
        begin = self._headers.clock_ns()
        self._publish_status(online=True, reason="birth", sequence=2 * self._number)
        while not stop.is_set():
            with self._changed:
                if self._ended:
                    break
                room = MAX_IN_FLIGHT - len(self._under_way)
                if room == 0:
                    self._changed.wait(_IDLE_SECONDS)
                    continue
            rows = self._outbox.lease(room)
            for row in rows:
                self._publish(TopicKind(row.kind), row.payload, row.row_id)
            if not rows:
                self._outbox.wait_for_work(_IDLE_SECONDS)
        return (self._headers.clock_ns() - begin) / 1e9

    def say_goodbye(self, timeout_s: float = 2.0) -> None:
        """Wait for what is under way, then publish that the device stops."""
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way or self._ended, timeout_s)
        message = self._publish_status(online=False, reason="stop", sequence=2 * self._number + 1)
        if message.rc == paho.MQTT_ERR_SUCCESS:
            message.wait_for_publish(timeout_s)

    def close(self) -> None:
        """Disconnect and end the library's thread."""
        self._client.disconnect()
        self._client.loop_stop()

    def _make_client(self, version: MQTTProtocolVersion) -> paho.Client:
        clean: dict[str, Any] = {} if self._modern else {"clean_session": True}
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._session.device_id,
            protocol=version,
            reconnect_on_failure=False,
            **clean,
        )
        client.connect_timeout = _CONNECT_SECONDS
        client.max_inflight_messages_set(MAX_IN_FLIGHT)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        will = self._status(online=False, reason="will", sequence=2 * self._number + 1)
        client.will_set(self._topics[TopicKind.STATUS], will, qos=1, retain=True)
        return client

    def _publish(self, kind: TopicKind, payload: bytes, row_id: int | None) -> paho.MQTTMessageInfo:
        """Send; a message of the outbox has its row, a status (retained) has none."""
        message = self._client.publish(
            self._topics[kind], payload, 1, retain=row_id is None, properties=self._properties[kind]
        )
        with self._changed:
            if message.rc == paho.MQTT_ERR_SUCCESS:
                self._under_way[message.mid] = row_id
                if message.mid in self._early:
                    self._settle(message.mid, self._early.pop(message.mid))
            else:
                self._ended = True  # the row stays in the outbox
        return message

    def _publish_status(self, *, online: bool, reason: str, sequence: int) -> paho.MQTTMessageInfo:
        payload = self._status(online=online, reason=reason, sequence=sequence)
        return self._publish(TopicKind.STATUS, payload, None)

    def _status(self, *, online: bool, reason: str, sequence: int) -> bytes:
        header = self._headers.make(sequence, self._trace)
        return encode(DeviceStatus(header, online, reason, self._session.agent_version))

    def _settle(self, mid: int, failure: int | None) -> None:
        """An acknowledgement: delete the row, or keep it when a later try may succeed."""
        row_id = self._under_way.pop(mid)
        if row_id is None:
            return
        if failure is None:
            self._outbox.acknowledge([row_id])
        elif failure in _NEVER_ACCEPTED:
            _LOG.error(
                "the broker will never accept message %d (reason 0x%02x): counted as lost", row_id, failure
            )
            self._outbox.discard([row_id])
        else:
            self.reason = f"the broker refused a message (reason 0x{failure:02x})"
            self._ended = True

    def _on_publish(
        self, _client: paho.Client, _userdata: Any, mid: int, code: Any, _properties: Any
    ) -> None:
        failure = int(code.value) if code.is_failure else None
        with self._changed:
            try:
                if mid in self._under_way:
                    self._settle(mid, failure)
                else:
                    self._early[mid] = failure
            except WearfleetError as error:  # the disk refused; the row stays and is sent again
                self.reason, self._ended = str(error), True
            self._changed.notify_all()

    def _on_connect(
        self, _client: paho.Client, _userdata: Any, _flags: Any, code: Any, _properties: Any
    ) -> None:
        with self._changed:
            if not code.is_failure:
                self._answer = _Outcome.CONNECTED
            else:
                self.reason = str(code)
                version = code.value == 0x84
                self._answer = _Outcome.WRONG_VERSION if version else _Outcome.REFUSED
            self._changed.notify_all()

    def _on_disconnect(
        self, _client: paho.Client, _userdata: Any, _flags: Any, code: Any, _properties: Any
    ) -> None:
        with self._changed:
            self._ended = True
            self.reason = self.reason or (str(code) if code.is_failure else "")
            self._changed.notify_all()


def _properties(schema: str) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ContentType = f"application/x-protobuf; schema={schema}"
    return properties
