"""The state folder: one running service at a time, and what command lines need to know of it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.fleet.private_files import read_private, write_private

__all__ = ["BrokerPlace", "RunningService", "exclusive", "read_running", "write_running"]

_FILE: Final = "service.json"


@dataclass(frozen=True, slots=True)
class BrokerPlace:
    """Where devices reach the broker."""

    host: str
    port: int
    tls: bool


@dataclass(frozen=True, slots=True)
class RunningService:
    """Where devices and people reach a service: one host, three ports, and the broker."""

    pid: int
    host: str
    cloud_port: int
    enrol_port: int
    web_port: int
    broker: BrokerPlace

    @property
    def cloud(self) -> str:
        """``host:port`` of gRPC with mutual TLS."""
        return f"{self.host}:{self.cloud_port}"

    @property
    def enrol(self) -> str:
        """``host:port`` of enrolment."""
        return f"{self.host}:{self.enrol_port}"

    @property
    def web(self) -> str:
        """URL of the live page."""
        return f"http://{self.host}:{self.web_port}"


@contextmanager
def exclusive(state_dir: Path) -> Iterator[None]:
    """Hold the folder for one service.

    Raises:
        ConfigError: another service runs on it, or it cannot be used.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(state_dir / "service.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot use the state folder {state_dir}: {error}; choose another --state"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ConfigError(
            f"another service runs on {state_dir}; stop it or choose another --state"
        ) from error
    try:
        yield
    finally:
        os.close(lock)


def write_running(state_dir: Path, running: RunningService) -> None:
    """Note the addresses for command lines."""
    write_private(state_dir / _FILE, json.dumps(asdict(running), indent=2).encode() + b"\n")


def read_running(state_dir: Path) -> RunningService | None:
    """The addresses of the last start; None when the service has never run here.

    Raises:
        ConfigError: the file is damaged.
    """
    path = state_dir / _FILE
    if not path.exists():
        return None
    try:
        values = json.loads(read_private(path))
        return RunningService(**{**values, "broker": BrokerPlace(**values["broker"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged ({error}); start the service again") from error
