"""What a service needs of its machine, checked one by one."""

import datetime as dt
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from wearfleet_protos.errors import WearfleetError

from wearfleet_cloud.config import Settings
from wearfleet_cloud.fleet.private_files import read_private
from wearfleet_cloud.service.broker import ExternalBroker, find_mosquitto, free_port
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.service.state_dir import exclusive, read_running
from wearfleet_cloud.storage.audit import verify_audit

__all__ = ["Finding", "examine"]

_LEAST_FREE_BYTES: Final = 1024**3
_WARN_DAYS: Final = 14


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was found, and what to do when it is not ``ok``."""

    check: str
    ok: bool
    detail: str
    hint: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Carry out every check; none changes anything but to create missing state."""
    checks: tuple[tuple[str, Callable[[Settings], Finding]], ...] = (
        ("state folder", _state),
        ("audit log", _audit),
        ("disk", _disk),
        ("certificate", _certificate),
        ("broker", _broker),
        ("ports", _ports),
        ("model contract", _onnx),
    )
    findings = []
    for name, check in checks:
        try:
            findings.append(check(settings))
        except WearfleetError as error:
            findings.append(Finding(name, ok=False, detail=str(error), hint="see the detail"))
    return findings


def _state(settings: Settings) -> Finding:
    state = open_state(settings)
    try:
        return Finding(
            "state folder", ok=True, detail=f"{settings.service.state_dir}, {state.database.dialect}"
        )
    finally:
        state.database.close()


def _audit(settings: Settings) -> Finding:
    state = open_state(settings)
    try:
        with state.database.read() as connection:
            count = verify_audit(connection)
    finally:
        state.database.close()
    return Finding("audit log", ok=True, detail=f"{count} entries, chain unbroken")


def _disk(settings: Settings) -> Finding:
    free = shutil.disk_usage(settings.service.state_dir).free
    ok = free >= _LEAST_FREE_BYTES
    hint = "" if ok else "free some space, or lower ingest.keep_hours"
    return Finding("disk", ok=ok, detail=f"{free / 1e9:.1f} GB free", hint=hint)


def _certificate(settings: Settings) -> Finding:
    path = settings.service.state_dir / "keys" / "server.pem"
    if not path.exists():
        return Finding("certificate", ok=True, detail="made at the first start")
    end = x509.load_pem_x509_certificate(read_private(path)).not_valid_after_utc
    days = (end - dt.datetime.now(dt.UTC)).days
    hint = "" if days > _WARN_DAYS else "restart the service; it makes a new one"
    return Finding("certificate", ok=days > _WARN_DAYS, detail=f"valid for {days} days", hint=hint)


def _broker(settings: Settings) -> Finding:
    broker = settings.broker
    if broker.kind == "external":
        where = ExternalBroker.place_of(broker.url)
        return Finding("broker", ok=True, detail=f"external, {where[0]}:{where[1]}")
    program = find_mosquitto()
    if program is not None and broker.kind != "embedded":
        return Finding("broker", ok=True, detail=program)
    ok = broker.kind != "mosquitto"
    hint = "install mosquitto; the embedded broker loses what is under way when it is killed"
    return Finding("broker", ok=ok, detail="embedded" if ok else "mosquitto is not installed", hint=hint)


def _ports(settings: Settings) -> Finding:
    service = settings.service
    try:
        with exclusive(service.state_dir):
            for name in ("port", "enrol_port", "web_port"):
                free_port(service.host, getattr(service, name), f"service.{name}")
    except WearfleetError:
        running = read_running(service.state_dir)
        if running is None:
            raise
        return Finding("ports", ok=True, detail=f"in use by the service, process {running.pid}")
    return Finding("ports", ok=True, detail="free")


def _onnx(_: Settings) -> Finding:
    missing = [name for name in ("onnx", "onnxruntime", "torch") if importlib.util.find_spec(name) is None]
    hint = "pip install 'wearfleet[cloud]'" if missing else ""
    return Finding(
        "model contract",
        ok=not missing,
        detail=f"missing {missing}" if missing else "packages found",
        hint=hint,
    )
