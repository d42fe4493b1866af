"""Settings of the agent: one TOML file, read into frozen dataclasses; an unknown key is an error."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar, get_type_hints

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import NO_RANK_LIMIT

__all__ = [
    "AgentConfig",
    "BrokerConfig",
    "FederationConfig",
    "OutboxConfig",
    "PolicyConfig",
    "SensorConfig",
    "load_config",
    "parse_config",
    "with_changes",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SensorConfig:
    """Where samples come from.

    Args:
        recording: file to replay; empty for no sensor.
        speed: 1 is real time, 10 ten times faster, 0 as fast as the agent can.
        repeat: start again at the end.
    """

    recording: str = ""
    speed: float = 1.0
    repeat: bool = False

    def __post_init__(self) -> None:
        _check(self.speed >= 0, f"sensor.speed must be 0 or more, got {self.speed}")


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """What may leave the device.

    Args:
        share_raw_windows: send sensor windows besides predictions.
        share_annotations: send the class that the wearer or the recording states with each prediction.
    """

    share_raw_windows: bool = False
    share_annotations: bool = True


@dataclass(frozen=True, slots=True)
class OutboxConfig:
    """Limits of the outbox.

    Args:
        max_messages: above it the oldest waiting message is dropped and counted.
        max_bytes: the same for the sum of the payloads.
        drain_seconds: longest wait at a clean stop for the outstanding acknowledgements.
    """

    max_messages: int = 500_000
    max_bytes: int = 1 << 30
    drain_seconds: float = 10.0

    def __post_init__(self) -> None:
        _check(self.max_messages >= 1, f"outbox.max_messages must be at least 1, got {self.max_messages}")
        _check(self.max_bytes >= 1, f"outbox.max_bytes must be at least 1, got {self.max_bytes}")
        _check(self.drain_seconds >= 0, f"outbox.drain_seconds must be 0 or more, got {self.drain_seconds}")


@dataclass(frozen=True, slots=True)
class FederationConfig:
    """Taking part in federated rounds.

    Args:
        enabled: ask for tasks at all.
        poll_seconds: how long one question may wait at the server, at most 60.
        device_class: gateway, phone or wearable; says how long it may be silent while it works.
        holdout_fraction: later share of each activity that is only ever used to measure.
        max_memory_mb: resident memory above which a plan is stopped.
        max_seconds: longest computation of one task, whatever its plan allows.
        max_megabytes: most bytes of one task on the wire, whatever its plan allows.
        secure_minimum_cohort: with secure aggregation: join no smaller cohort, unmask no sum of fewer devices.
        max_epsilon: privacy that a plan's own clip and noise must give a round, at delta 1e-5; inf for no demand.
        strategies: names of the strategies to take part in, separated by commas; empty for all.
        secure_only: send no update and no figure but in such a sum; other training tasks are turned down.
        max_lora_rank: highest rank of low-rank factors to train, at least 1; that of the network when it is left out.
    """

    enabled: bool = True
    poll_seconds: float = 20.0
    device_class: str = "wearable"
    holdout_fraction: float = 0.5
    max_memory_mb: float = 512.0
    max_seconds: float = 3600.0
    max_megabytes: float = 256.0
    secure_minimum_cohort: int = 10
    secure_only: bool = False
    max_epsilon: float = math.inf
    strategies: str = ""
    max_lora_rank: int = NO_RANK_LIMIT

    def __post_init__(self) -> None:
        _check(
            0 <= self.poll_seconds <= 60, f"federation.poll_seconds must be 0 to 60, got {self.poll_seconds}"
        )
        _check(
            self.device_class in ("gateway", "phone", "wearable"),
            f"federation.device_class must be gateway, phone or wearable, got {self.device_class!r}",
        )
        _check(0 < self.holdout_fraction < 1, "federation.holdout_fraction must be between 0 and 1")
        _check(
            min(self.max_memory_mb, self.max_seconds, self.max_megabytes) > 0,
            "federation limits must be positive",
        )
        _check(
            self.secure_minimum_cohort >= 3,
            f"federation.secure_minimum_cohort must be at least 3, got {self.secure_minimum_cohort}",
        )
        _check(self.max_epsilon > 0, f"federation.max_epsilon must be above 0, got {self.max_epsilon}")
        _check(
            self.max_lora_rank >= 1,
            f"federation.max_lora_rank must be at least 1 (leave it out for no limit), got {self.max_lora_rank}",
        )


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Another broker than the one named at enrolment; an empty host keeps that one."""

    host: str = ""
    port: int = 8883
    tls: bool = True

    def __post_init__(self) -> None:
        _check(1 <= self.port <= 65_535, f"broker.port must be 1 to 65535, got {self.port}")


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """All settings, one section a part.

    Args:
        health_seconds: time between two health messages.
    """

    sensor: SensorConfig = field(default_factory=SensorConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    outbox: OutboxConfig = field(default_factory=OutboxConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    health_seconds: float = 5.0

    def __post_init__(self) -> None:
        _check(self.health_seconds > 0, f"health_seconds must be positive, got {self.health_seconds}")


_SECTIONS: Final = {"sensor", "policy", "outbox", "federation", "broker"}


def load_config(path: Path) -> AgentConfig:
    """Settings from a file; the defaults when there is none.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.
    """
    if not path.exists():
        return AgentConfig()
    try:
        return parse_config(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_config(text: str) -> AgentConfig:
    """Settings from TOML text.

    Raises:
        ConfigError: not TOML, an unknown key, a wrong type, or a value out of range.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from error
    return _build(AgentConfig, document, "")


def with_changes(config: AgentConfig, section: str, **changes: object) -> AgentConfig:
    """A copy in which one section has other values; values that are None change nothing."""
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(config, **{section: replace(getattr(config, section), **given)})


def _build(cls: type[T], values: dict[str, Any], prefix: str) -> T:
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ConfigError(f"unknown key {prefix}{unknown[0]}; known: {', '.join(sorted(known))}")
    hints = get_type_hints(cls)
    return cls(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})


def _convert(kind: Any, value: object, name: str) -> object:
    if name in _SECTIONS:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a section, got {value!r}")
        return _build(kind, value, f"{name}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
