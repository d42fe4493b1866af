"""The embedded broker for machines without Mosquitto: amqtt, in this process, MQTT 3.1.1, on one event loop.

It checks the same certificates: amqtt hands its plugins the TLS connection, and these two plugins take the common
name from it as the user name, refuse a client id that differs, and bind topics to it. What it has accepted but not
yet delivered lives in memory only and is lost when the process is killed; use Mosquitto where that matters.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from amqtt.broker import Broker as AmqttBroker  # type: ignore[import-untyped]
from amqtt.contexts import Action  # type: ignore[import-untyped]
from amqtt.errors import AMQTTError  # type: ignore[import-untyped]
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin  # type: ignore[import-untyped]
from amqtt.session import Session  # type: ignore[import-untyped]
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.fleet.identity import SERVICE_NAME, ServerFiles
from wearfleet_cloud.service.broker import client_context, free_port
from wearfleet_cloud.service.mosquitto_files import DEVICE_READS, DEVICE_WRITES
from wearfleet_cloud.service.mqtt_session import BrokerEndpoint

__all__ = ["CertificatePlugin", "EmbeddedBroker", "TopicPlugin", "may"]

_LOGGER: Final = logging.getLogger(__name__)
_OWN: Final = re.compile(r"wearfleet/v1/[^/+#]+/([^/+#]+)/(.+)")


@dataclass(slots=True)
class Gate:
    """Who may connect; shared by the broker and its plugins, which amqtt creates by name."""

    open: bool = False
    revoked: frozenset[str] = frozenset()


def may(user: str, action: Action, topic: str) -> bool:
    """The access list: the service reads everything and writes commands, a device only below its own name."""
    if user == SERVICE_NAME:
        return topic.startswith("wearfleet/v1/")
    match = _OWN.fullmatch(topic)
    if match is None or match[1] != user:
        return False
    if action is Action.PUBLISH:
        return match[2] in DEVICE_WRITES
    return match[2] in DEVICE_READS or match[2].startswith("cmd/")


class CertificatePlugin(BaseAuthPlugin):  # type: ignore[misc]
    """Takes the identity from the client's certificate, which TLS has verified."""

    gates: ClassVar[dict[str, Gate]] = {}

    @dataclass
    class Config:
        """Which gate to ask."""

        gate: str = ""

    async def authenticate(self, *, session: Session) -> bool | None:
        """Accept a client whose certificate and client id name the same device."""
        certificate = session.ssl_object.getpeercert() if session.ssl_object else None
        name = _common_name(certificate or {})
        gate = self.gates[self.config.gate]
        admitted = name == SERVICE_NAME or (gate.open and name not in gate.revoked)
        if not name or not admitted or session.client_id != name:
            _LOGGER.warning("client %r with certificate %r refused", session.client_id, name)
            return False
        session.username = name
        return True


class TopicPlugin(BaseTopicPlugin):  # type: ignore[misc]
    """Applies the access list."""

    @dataclass
    class Config:
        """Which gate to ask."""

        gate: str = ""

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: Action | None = None
    ) -> bool | None:
        """True when the access list allows it."""
        if session is None or session.username is None or topic is None or action is None:
            return False
        gate = CertificatePlugin.gates[self.config.gate]
        return session.username not in gate.revoked and may(session.username, action, topic)


class EmbeddedBroker:
    """amqtt on the loop of the service.

    Args:
        host: address to bind to.
        port: 0 means any free one.
        files: TLS of the service.
    """

    def __init__(self, host: str, port: int, files: ServerFiles) -> None:
        self._host, self._port, self._files = host, port, files
        self._gate = Gate()
        self._broker: AmqttBroker | None = None
        self._endpoint: BrokerEndpoint | None = None

    @property
    def endpoint(self) -> BrokerEndpoint:
        """Where it listens."""
        assert self._endpoint is not None
        return self._endpoint

    async def start(self) -> None:
        """Listen; only the service itself is let in until :meth:`admit_devices`."""
        port = free_port(self._host, self._port, "broker.port")
        gate = f"{self._host}:{port}"
        CertificatePlugin.gates[gate] = self._gate
        self._broker = AmqttBroker(self._configuration(f"{self._host}:{port}", gate))
        try:
            await self._broker.start()
        except (AMQTTError, OSError) as error:
            raise ConfigError(f"the embedded broker cannot listen on {self._host}:{port}: {error}") from error
        self._endpoint = BrokerEndpoint(self._host, port, client_context(self._files))

    def admit_devices(self) -> None:
        """Let devices in: from now on nothing they publish is without a reader."""
        self._gate.open = True

    def revoke(self, devices: Sequence[str]) -> None:
        """Refuse their connections and messages."""
        self._gate.revoked = frozenset(devices)

    async def stop(self) -> None:
        """Close every connection."""
        if self._broker is not None:
            await asyncio.wait_for(self._broker.shutdown(), timeout=10)

    def _configuration(self, bind: str, gate: str) -> dict[str, Any]:
        here = __name__
        return {
            "listeners": {
                "default": {
                    "type": "tcp",
                    "bind": bind,
                    "ssl": True,
                    "cafile": str(self._files.ca),
                    "certfile": str(self._files.certificate),
                    "keyfile": str(self._files.key),
                }
            },
            "plugins": {
                f"{here}.CertificatePlugin": {"gate": gate},
                f"{here}.TopicPlugin": {"gate": gate},
            },
        }


def _common_name(certificate: dict[str, Any]) -> str:
    for part in certificate.get("subject", ()):
        for key, value in part:
            if key == "commonName":
                return str(value)
    return ""
