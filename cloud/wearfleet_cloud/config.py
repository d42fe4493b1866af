"""Settings of the service: a TOML file, then environment variables, then flags; later ones win.

Every section becomes one small frozen dataclass, and only that is handed to the component. An environment variable
is called ``WEARFLEET__SECTION__KEY``, for example ``WEARFLEET__SERVICE__PORT=7443``. Unknown sections and keys are
errors.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings.exceptions import SettingsError
from wearfleet_protos.errors import ConfigError, ProtocolError
from wearfleet_protos.topics import check_name

__all__ = [
    "BrokerConfig",
    "DatabaseConfig",
    "FederationConfig",
    "IngestConfig",
    "ServiceConfig",
    "Settings",
    "load_settings",
]

_PREFIX: Final = "WEARFLEET__"

Port = Annotated[int, Field(ge=0, le=65535)]


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Where the service keeps its state and where it listens; port 0 means any free one.

    Args:
        state_dir: database, artifacts, keys and certificates; readable by the service's user only.
        host: address that every listener binds to.
        public_host: name or address under which devices reach this machine; part of the server certificate.
        port: gRPC with mutual TLS.
        enrol_port: gRPC for enrolment, with the server's certificate only.
        web_port: live page, JSON interface, ``/metrics`` and ``/healthz``; plain HTTP.
        tenant: tenant of newly enrolled devices.
        source_name: data set or simulator behind the streams, for the live page; "" for real devices.
        simulated: True when that source is a simulator.
    """

    state_dir: Path
    host: str
    public_host: str
    port: int
    enrol_port: int
    web_port: int
    tenant: str
    source_name: str
    simulated: bool


@dataclass(frozen=True, slots=True)
class DatabaseConfig:
    """SQLAlchemy URL of the database."""

    url: str


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Which MQTT broker to use.

    Args:
        kind: ``auto`` (Mosquitto when it is installed, else embedded), ``mosquitto``, ``embedded`` or ``external``.
        url: ``mqtt://host:port`` or ``mqtts://host:port`` of an external broker; "" otherwise.
        port: where a broker of our own listens; 0 means any free port.
        max_queued: messages that our broker keeps for the service while it is away.
    """

    kind: Literal["auto", "mosquitto", "embedded", "external"]
    url: str
    port: int
    max_queued: int


@dataclass(frozen=True, slots=True)
class IngestConfig:
    """How telemetry gets into the database.

    Args:
        linger_s: longest time that a message waits for others before its transaction.
        max_batch: most messages in one transaction.
        keep_hours: windows and predictions older than this are deleted; 0 keeps them forever.
    """

    linger_s: float
    max_batch: int
    keep_hours: float


@dataclass(frozen=True, slots=True)
class FederationConfig:
    """Limits of federated rounds.

    Args:
        recent_s: a device that polled within this time can be invited.
        max_update_bytes: largest update that a device may upload.
        gateway_lease_s: a gateway at work that is silent for half as long again is lost to its round.
        phone_lease_s: the same for a phone.
        wearable_lease_s: the same for a wearable.
    """

    recent_s: float
    max_update_bytes: int
    gateway_lease_s: float
    phone_lease_s: float
    wearable_lease_s: float


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a service."""

    service: ServiceConfig
    database: DatabaseConfig
    broker: BrokerConfig
    ingest: IngestConfig
    federation: FederationConfig


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Service(_Section):
    state_dir: Path = Path("wearfleet-state")
    host: str = "127.0.0.1"
    public_host: str = ""
    port: Port = 7443
    enrol_port: Port = 7444
    web_port: Port = 7480
    tenant: str = "default"
    source_name: str = ""
    simulated: bool = False


class _Database(_Section):
    url: str = ""


class _Broker(_Section):
    kind: Literal["auto", "mosquitto", "embedded"] = "auto"
    url: str = ""
    port: Port = 7883
    max_queued: int = Field(default=200_000, ge=1000)


class _Ingest(_Section):
    linger_s: float = Field(default=0.05, ge=0.0, le=5.0)
    max_batch: int = Field(default=2000, ge=1, le=100_000)
    keep_hours: float = Field(default=72.0, ge=0.0)


class _Federation(_Section):
    recent_s: float = Field(default=90.0, gt=0.0)
    max_update_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)
    gateway_lease_s: float = Field(default=60.0, gt=0.0)
    phone_lease_s: float = Field(default=900.0, gt=0.0)
    wearable_lease_s: float = Field(default=86_400.0, gt=0.0)


class _Raw(BaseSettings):
    model_config = SettingsConfigDict(extra="forbid", env_prefix=_PREFIX, env_nested_delimiter="__")

    service: _Service = _Service()
    database: _Database = _Database()
    broker: _Broker = _Broker()
    ingest: _Ingest = _Ingest()
    federation: _Federation = _Federation()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's signature
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the file that ``load_settings`` passes under a private key."""
        assert isinstance(init_settings, InitSettingsSource)
        assert isinstance(env_settings, EnvSettingsSource)
        file = init_settings.init_kwargs.pop("_file", None)
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        return (*sources, TomlConfigSettingsSource(settings_cls, Path(file))) if file else sources


def load_settings(file: Path | None = None, flags: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
    """Read the settings.

    Args:
        file: TOML file with sections ``[service]``, ``[database]``, ``[broker]``, ``[ingest]``, ``[federation]``.
        flags: values of the command line by section and key; they win.

    Raises:
        ConfigError: the file is missing or not TOML, a section or key is unknown, or a value is out of its range.
    """
    if file is not None and not file.is_file():
        raise ConfigError(f"settings file {file} does not exist; leave out --config to use the defaults")
    _check_environment(os.environ)
    values: dict[str, Any] = {section: dict(keys) for section, keys in (flags or {}).items()}
    try:
        raw = _Raw(**values, **dict[str, Any]({"_file": str(file)} if file else {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"setting {where}: {first['msg']} (got {first['input']!r})") from error
    except (SettingsError, ValueError) as error:
        raise ConfigError(f"settings cannot be read: {error}") from error
    return _freeze(raw)


def _check_environment(environment: Mapping[str, str]) -> None:
    sections = set(_Raw.model_fields)
    for name in environment:
        section = name.upper().removeprefix(_PREFIX).split("__")[0].lower()
        if name.upper().startswith(_PREFIX) and section not in sections:
            raise ConfigError(
                f"environment variable {name}: no section {section!r}; known are {sorted(sections)}"
            )


def _freeze(raw: _Raw) -> Settings:
    service = raw.service
    try:
        check_name(service.tenant, "setting service.tenant")
    except ProtocolError as error:
        raise ConfigError(str(error)) from error
    state_dir = service.state_dir.expanduser().absolute()
    values = service.model_dump() | {
        "state_dir": state_dir,
        "public_host": service.public_host or service.host,
    }
    broker = raw.broker.model_dump()
    if raw.broker.url:
        broker["kind"] = "external"
    return Settings(
        service=ServiceConfig(**values),
        database=DatabaseConfig(raw.database.url or f"sqlite:///{state_dir / 'wearfleet.db'}"),
        broker=BrokerConfig(**broker),
        ingest=IngestConfig(**raw.ingest.model_dump()),
        federation=FederationConfig(**raw.federation.model_dump()),
    )
