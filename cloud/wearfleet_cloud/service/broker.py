"""The MQTT broker of the service: Mosquitto as a child, any broker by URL, or the embedded one.

Devices authenticate with the certificate of their enrolment. Mosquitto takes its common name as user name and as
client id, and the generated access list lets a device write only below its own name.
"""

import logging
import os
import shutil
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.config import BrokerConfig
from wearfleet_cloud.fleet.identity import ServerFiles
from wearfleet_cloud.service.mqtt_session import BrokerEndpoint

__all__ = [
    "Broker",
    "ExternalBroker",
    "client_context",
    "create_broker",
    "find_mosquitto",
    "free_port",
]

_LOGGER: Final = logging.getLogger(__name__)


class Broker(Protocol):
    """A broker that the service uses."""

    @property
    def endpoint(self) -> BrokerEndpoint:
        """Where the service connects; known after :meth:`start`."""

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            ConfigError: the port is in use, or the broker cannot be started.
        """

    def admit_devices(self) -> None:
        """The service has subscribed: devices may publish now."""

    def revoke(self, devices: Sequence[str]) -> None:
        """Shut these devices out, from now on and after a restart."""

    async def stop(self) -> None:
        """End the broker if it is ours."""


def create_broker(config: BrokerConfig, folder: Path, host: str, files: ServerFiles) -> Broker:
    """The broker that the settings ask for.

    Args:
        config: kind, address, limits.
        folder: for generated files and the queue.
        host: address to bind to.
        files: TLS of the service.

    Raises:
        ConfigError: Mosquitto is wanted but not installed, or the URL is wrong.
    """
    if config.kind == "external":
        return ExternalBroker(config.url, files)
    from wearfleet_cloud.service.mosquitto import MosquittoBroker  # noqa: PLC0415 - it needs this module

    program = find_mosquitto()
    if config.kind == "embedded" or (config.kind == "auto" and program is None):
        from wearfleet_cloud.service.embedded_broker import EmbeddedBroker  # noqa: PLC0415 - slow, rarely used

        return EmbeddedBroker(host, config.port, files)
    if program is None:
        raise ConfigError(
            "mosquitto is not installed: install it, use --broker URL, or set broker.kind = 'embedded'"
        )
    return MosquittoBroker(program, config, folder, host, files)


def find_mosquitto() -> str | None:
    """Path of the Mosquitto program."""
    return shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def client_context(files: ServerFiles) -> ssl.SSLContext:
    """TLS of the service as a client of the broker."""
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.certificate, files.key)
    return context


def free_port(host: str, port: int, setting: str) -> int:
    """Check that a port is free; any free one for 0.

    Raises:
        ConfigError: it is in use, or the address is not of this machine; names the setting.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another {setting}"
            ) from error
        return int(probe.getsockname()[1])


class ExternalBroker:
    """A broker that somebody else runs; identity is enforced only if it checks our certificates.

    Args:
        url: ``mqtt://host:port`` or ``mqtts://host:port``.
        files: TLS of the service.

    Raises:
        ConfigError: another kind of URL.
    """

    def __init__(self, url: str, files: ServerFiles) -> None:
        host, port, secure = self.place_of(url)
        self._endpoint = BrokerEndpoint(host, port, client_context(files) if secure else None)

    @staticmethod
    def place_of(url: str) -> tuple[str, int, bool]:
        """Host, port and whether TLS is used.

        Raises:
            ConfigError: another kind of URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"the broker's URL is wrong: {error}") from error
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise ConfigError(
                f"the broker's URL must look like mqtt://host:1883 or mqtts://host:8883, got {url!r}"
            )
        secure = parts.scheme == "mqtts"
        return parts.hostname, port or (8883 if secure else 1883), secure

    @property
    def endpoint(self) -> BrokerEndpoint:
        """The URL's."""
        return self._endpoint

    async def start(self) -> None:
        """It runs already."""
        if self._endpoint.tls is None:
            _LOGGER.warning("broker without TLS: anybody who reaches it can publish in any device's name")

    def admit_devices(self) -> None:
        """Not ours to decide."""

    def revoke(self, devices: Sequence[str]) -> None:
        """Not ours; the ingest refuses what revoked devices send."""

    async def stop(self) -> None:
        """Not ours."""
