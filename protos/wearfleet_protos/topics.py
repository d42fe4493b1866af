"""The MQTT topic grammar: ``wearfleet/v1/{tenant}/{device}/{kind}``; format and parse are exact inverses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from wearfleet_protos.errors import ProtocolError

__all__ = ["NAME_PATTERN", "Command", "Topic", "TopicKind", "check_name", "parse_topic", "subscription"]

NAME_PATTERN: Final = r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?"
_NAME: Final = re.compile(NAME_PATTERN)
_ROOT: Final = "wearfleet/v1"


class TopicKind(StrEnum):
    """What a topic carries."""

    WINDOW = "tele/window"
    PREDICTION = "tele/prediction"
    HEALTH = "tele/health"
    DRIFT = "evt/drift"
    REPORTED = "state/reported"
    DESIRED = "state/desired"
    STATUS = "status"


def check_name(name: str, what: str) -> str:
    """Check a tenant, device or command name.

    Raises:
        ProtocolError: not 1 to 64 of a-z, 0-9 and inner hyphens.
    """
    if not _NAME.fullmatch(name):
        raise ProtocolError(f"{what} must be 1 to 64 of a-z, 0-9 and inner '-', got {name[:80]!r}")
    return name


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic of one device.

    Raises:
        ProtocolError: tenant or device is not a valid name.
    """

    tenant: str
    device: str
    kind: TopicKind

    def __post_init__(self) -> None:
        check_name(self.tenant, "tenant")
        check_name(self.device, "device")

    def __str__(self) -> str:
        return f"{_ROOT}/{self.tenant}/{self.device}/{self.kind}"


@dataclass(frozen=True, slots=True)
class Command:
    """A command topic of one device: ``.../cmd/{name}``."""

    tenant: str
    device: str
    name: str

    def __post_init__(self) -> None:
        check_name(self.tenant, "tenant")
        check_name(self.device, "device")
        check_name(self.name, "command")

    def __str__(self) -> str:
        return f"{_ROOT}/{self.tenant}/{self.device}/cmd/{self.name}"


def parse_topic(text: str) -> Topic | Command:
    """Parse a topic; the exact inverse of ``str``.

    Raises:
        ProtocolError: not a wearfleet topic.
    """
    parts = text.split("/", 4)
    if len(parts) != 5 or f"{parts[0]}/{parts[1]}" != _ROOT:
        raise ProtocolError(f"expected {_ROOT}/<tenant>/<device>/<kind>, got {text[:200]!r}")
    tenant, device, rest = parts[2:]
    if rest.startswith("cmd/"):
        return Command(tenant, device, rest.removeprefix("cmd/"))
    try:
        return Topic(tenant, device, TopicKind(rest))
    except ValueError:
        raise ProtocolError(
            f"unknown topic kind {rest[:80]!r}; known are {[str(k) for k in TopicKind]}"
        ) from None


def subscription(kind: TopicKind, tenant: str = "+", device: str = "+") -> str:
    """Subscription pattern of one kind; ``+`` stands for every tenant or device."""
    for name, what in ((tenant, "tenant"), (device, "device")):
        if name != "+":
            check_name(name, what)
    return f"{_ROOT}/{tenant}/{device}/{kind}"
