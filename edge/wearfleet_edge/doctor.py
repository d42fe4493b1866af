"""Look at everything an agent needs, and say for each thing that is wrong what to do."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from wearfleet_protos.errors import ConfigError, DataError, NotFoundError, TransportError, WearfleetError

from wearfleet_edge.config import load_config
from wearfleet_edge.identity import certificate_validity, load_enrolment, require_valid_certificate
from wearfleet_edge.state import read_json

if TYPE_CHECKING:
    from wearfleet_edge.identity import Enrolment
    from wearfleet_edge.state import StateDirectory
    from wearfleet_edge.transport.cloud import Reported

__all__ = ["Check", "examine"]

_LEAST_FREE_BYTES: Final = 100 * 1024 * 1024
_CONNECT_SECONDS: Final = 5.0
_LARGEST_CLOCK_ERROR_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one look: what was found, or what is wrong and what to do."""

    name: str
    ok: bool
    detail: str


def examine(state: StateDirectory) -> tuple[Check, ...]:
    """Run every check; one that fails does not stop the others."""
    looks: tuple[tuple[str, Callable[[StateDirectory], str]], ...] = (
        ("settings", _settings),
        ("disk", _disk),
        ("identity", _identity),
        ("certificate", _certificate),
        ("onnx runtime", _onnx_runtime),
        ("model", _model),
        ("outbox", _outbox),
        ("broker", _broker),
        ("cloud", _cloud),
    )
    return tuple(_look(name, look, state) for name, look in looks)


def _look(name: str, look: Callable[[StateDirectory], str], state: StateDirectory) -> Check:
    try:
        return Check(name, ok=True, detail=look(state))
    except WearfleetError as error:
        return Check(name, ok=False, detail=str(error))


def _settings(state: StateDirectory) -> str:
    load_config(state.config)
    return str(state.config) if state.config.exists() else "defaults"


def _disk(state: StateDirectory) -> str:
    place = state.root if state.root.exists() else state.root.resolve().parent
    if not place.exists():
        raise NotFoundError(f"{place} does not exist; make it or use another --state")
    free = shutil.disk_usage(place).free
    if free < _LEAST_FREE_BYTES:
        raise DataError(f"only {free / 1e6:.0f} MB are free below {place}; make room")
    return f"{free / 1e9:.1f} GB free"


def _identity(state: StateDirectory) -> str:
    enrolment = load_enrolment(state)
    mode = state.key.stat().st_mode & 0o777 if state.key.exists() else 0
    if mode & 0o077:
        raise ConfigError(f"{state.key} can be read by others (mode {mode:o}); run: chmod 600 {state.key}")
    return f"{enrolment.device_id} of {enrolment.tenant}"


def _certificate(state: StateDirectory) -> str:
    load_enrolment(state)
    require_valid_certificate(state, datetime.now(UTC))
    return f"valid until {certificate_validity(state)[1]:%Y-%m-%d %H:%M} UTC"


def _onnx_runtime(state: StateDirectory) -> str:
    import onnxruntime  # type: ignore[import-untyped]  # noqa: PLC0415  slow to import

    del state
    if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
        raise ConfigError("ONNX Runtime has no CPU provider; install the package onnxruntime")
    return str(onnxruntime.__version__)


def _model(state: StateDirectory) -> str:
    from wearfleet_edge.runtime import Recogniser  # noqa: PLC0415  imports ONNX Runtime
    from wearfleet_edge.slots import Slots  # noqa: PLC0415

    installed = Slots(state.models, load_enrolment(state).signing_keys).current()
    if installed is None:
        raise NotFoundError("no model yet; run the agent while a model is published")
    Recogniser(installed.model, installed.manifest)
    return f"{installed.manifest.model_id} version {installed.manifest.version}"


def _outbox(state: StateDirectory) -> str:
    from wearfleet_edge.outbox import inspect_outbox  # noqa: PLC0415

    if not state.outbox.exists():
        return "empty"
    summary = inspect_outbox(state.outbox)
    return f"{summary.depth} waiting, {sum(summary.lost.values())} lost"


def _broker(state: StateDirectory) -> str:
    from wearfleet_edge.transport.mqtt import device_tls  # noqa: PLC0415  imports the MQTT library

    own = load_config(state.config).broker
    told = load_enrolment(state).broker
    host, port, tls = (own.host, own.port, own.tls) if own.host else (told.host, told.port, told.tls)
    try:
        with socket.create_connection((host, port), _CONNECT_SECONDS) as plain:
            if tls:
                context = device_tls(state.authority, state.certificate, state.key)
                with context.wrap_socket(plain, server_hostname=host):
                    pass
    except OSError as error:
        raise TransportError(f"no broker answers at {host}:{port} ({error}); is it running?") from error
    return f"{host}:{port}{' with TLS' if tls else ''}"


def _cloud(state: StateDirectory) -> str:
    from wearfleet_edge.transport.rpc import RpcCloud  # noqa: PLC0415  imports gRPC

    enrolment = load_enrolment(state)
    cloud = RpcCloud.of_device(state, enrolment)
    try:
        reply = cloud.heartbeat(_reported(state, enrolment))
    finally:
        cloud.close()
    error_s = datetime.now(UTC).timestamp() - reply.server_unix_ns / 1e9
    if abs(error_s) > _LARGEST_CLOCK_ERROR_S:
        raise ConfigError(f"this clock differs from the cloud's by {error_s:.0f} s; set it")
    return f"{enrolment.cloud_address}, clock error {error_s:+.1f} s"


def _reported(state: StateDirectory, enrolment: Enrolment) -> Reported:
    """What this device runs by its files: a report must be true, also when only the doctor sends it."""
    from wearfleet_edge.slots import Slots  # noqa: PLC0415
    from wearfleet_edge.transport.cloud import Reported  # noqa: PLC0415

    installed = Slots(state.models, enrolment.signing_keys).current()
    said = read_json(state.status) if state.status.exists() else {}
    return Reported(
        agent_version=version("wearfleet"),
        manifest_digest=installed.manifest_digest if installed else "",
        model_version=installed.manifest.version if installed else 0,
        personalised=bool(said.get("personalised")),
        refusal=str(said.get("model_refusal", "")),
    )
