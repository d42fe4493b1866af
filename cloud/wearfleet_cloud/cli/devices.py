"""``wearfleet-cloud devices``: who is enrolled, tickets for new ones, quarantine, revocation."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wearfleet_cloud.cli.state_options import (
    ConfigFile,
    Json,
    StateFolder,
    opened,
    print_json,
    print_table,
    time_text,
)

if TYPE_CHECKING:
    from wearfleet_cloud.storage.device_records import Device, StreamCount
    from wearfleet_cloud.storage.suspicions import Suspicion

__all__ = ["register"]

_group = typer.Typer(help="List, enrol, quarantine and revoke devices.", no_args_is_help=True)

DeviceId = Annotated[str, typer.Argument(help="Id from `devices list`.")]


def register(app: typer.Typer) -> None:
    """Add the group ``devices`` to the command line."""
    app.add_typer(_group, name="devices")


@_group.command("list")
def list_devices(config: ConfigFile = None, state: StateFolder = None, as_json: Json = False) -> None:
    """Every enrolled device, what it runs, and what came of its windows."""
    from wearfleet_cloud.storage import device_records
    from wearfleet_cloud.storage.suspicions import list_suspicions

    with opened(config, state) as (_, service), service.database.read() as connection:
        known = device_records.list_devices(connection)
        counts = device_records.stream_counts(connection)
        suspicions = list_suspicions(connection)
    rows = [_summary(device, counts) | _suspicion(suspicions.get(device.device_id)) for device in known]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("device", "name", "tenant", "last seen", "model", "personal", "windows", "lost", "again", "suspect",
         "state"),
        [
            (
                row["device_id"], row["name"], row["tenant"], time_text(row["last_seen_ns"]), row["model_version"],
                "yes" if row["personalised"] else "no", row["windows"]["received"], row["windows"]["lost"],
                row["windows"]["duplicated"], _suspect(row), _standing(row),
            )
            for row in rows
        ],
    )  # fmt: skip


@_group.command("show")
def show(
    device_id: DeviceId, config: ConfigFile = None, state: StateFolder = None, as_json: Json = False
) -> None:
    """Everything known of one device."""
    from wearfleet_cloud.service.privacy_budget import privacy_of
    from wearfleet_cloud.storage import device_records
    from wearfleet_cloud.storage.suspicions import list_suspicions

    with opened(config, state) as (_, service), service.database.read() as connection:
        device = device_records.find_device(connection, device_id)
        counts = device_records.stream_counts(connection, device_id)
        health = device_records.health_of(connection, device_id)
        privacy = privacy_of(connection, device_id)
        suspicion = _suspicion(list_suspicions(connection).get(device_id))
    row = _summary(device, counts) | {
        **suspicion,
        "health": health,
        "privacy": privacy,
        "streams": [_stream(count) for count in counts],
    }
    if as_json:
        print_json(row)
        return
    told = {name: value for name, value in row.items() if name not in ("streams", "privacy")}
    print_table(("what", "value"), [*told.items(), *_privacy(privacy)])


@_group.command("enrol-code")
def enrol_code(
    *,
    name: Annotated[str, typer.Option(help="Name of the device: a-z, 0-9 and inner hyphens.")],
    tenant: Annotated[str | None, typer.Option(help="Tenant of the device.")] = None,
    hours: Annotated[float, typer.Option(min=0.01, help="The ticket can be used so long.")] = 24.0,
    address: Annotated[
        str | None, typer.Option(help="host:port of enrolment, as the device reaches it.")
    ] = None,
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Print a ticket for one new device; it works once."""
    from wearfleet_cloud.service.enrolment import make_ticket
    from wearfleet_cloud.service.state_dir import read_running

    with opened(config, state) as (settings, service):
        running = read_running(settings.service.state_dir)
        default = f"{settings.service.public_host}:{settings.service.enrol_port}"
        ticket = make_ticket(
            service.database,
            service.authority,
            address or (running.enrol if running else default),
            name=name,
            tenant=tenant or settings.service.tenant,
            now_ns=time.time_ns(),
            hours=hours,
        )
    if as_json:
        print_json({"ticket": ticket.encode(), "address": ticket.cloud_address, "name": name})
        return
    print(ticket.encode())


@_group.command("revoke")
def revoke(
    device_id: DeviceId, config: ConfigFile = None, state: StateFolder = None, as_json: Json = False
) -> None:
    """Shut a device out of both planes, for good; a running service notices within a second."""
    from wearfleet_cloud.storage.audit import append_audit
    from wearfleet_cloud.storage.device_records import revoke_device

    now_ns = time.time_ns()
    with opened(config, state) as (_, service), service.database.write() as connection:
        device = revoke_device(connection, device_id, now_ns)
        append_audit(connection, now_ns, "device.revoke", device_id)
    if as_json:
        print_json(asdict(device))
        return
    print(f"{device_id} is revoked")


@_group.command("quarantine")
def quarantine(
    device_id: DeviceId,
    *,
    reason: Annotated[str, typer.Option(help="Why; by default what the last rounds say of it.")] = "",
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Leave a device out of federated rounds; it streams and recognises on. `devices release` ends it."""
    from wearfleet_protos.errors import ConfigError

    from wearfleet_cloud.storage.audit import append_audit
    from wearfleet_cloud.storage.device_records import find_device, quarantine_device
    from wearfleet_cloud.storage.suspicions import Suspicion, list_suspicions

    now_ns = time.time_ns()
    with opened(config, state) as (_, service), service.database.write() as connection:
        find_device(connection, device_id)
        evidence = list_suspicions(connection).get(device_id, Suspicion(0, 0)).evidence
        told = "; ".join(part for part in (reason, evidence) if part)
        if not told:
            raise ConfigError(f"no round found {device_id} suspect; say with --reason why it is quarantined")
        device = quarantine_device(connection, device_id, now_ns, told)
        append_audit(connection, now_ns, "device.quarantine", device_id, device.quarantine_reason)
    if as_json:
        print_json(asdict(device))
        return
    print(f"{device_id} is left out of federated rounds: {device.quarantine_reason}")


@_group.command("release")
def release(
    device_id: DeviceId, config: ConfigFile = None, state: StateFolder = None, as_json: Json = False
) -> None:
    """Let a device from quarantine take part in federated rounds again."""
    from wearfleet_cloud.storage.audit import append_audit
    from wearfleet_cloud.storage.device_records import release_device

    with opened(config, state) as (_, service), service.database.write() as connection:
        device = release_device(connection, device_id)
        append_audit(connection, time.time_ns(), "device.release", device_id)
    if as_json:
        print_json(asdict(device))
        return
    print(f"{device_id} takes part in federated rounds again")


def _summary(device: Device, counts: list[StreamCount]) -> dict[str, Any]:
    own = [count for count in counts if count.device_id == device.device_id]
    return asdict(device) | {
        "windows": _total([count for count in own if count.kind == "window"]),
        "predictions": _total([count for count in own if count.kind == "prediction"]),
    }


def _privacy(spent: dict[str, Any]) -> list[tuple[str, str]]:
    """A line for each kind of epsilon: they mean different things."""
    lines = [
        (
            f"{unit}-level privacy",
            "epsilon {epsilon:.3g} at delta {delta:g}, {rounds} rounds".format(**spent[unit]),
        )
        for unit in ("client", "record")
    ]
    return [*lines, *((f"not asked by {run}", reason) for run, reason in spent["not_asked"].items())]


def _suspicion(found: Suspicion | None) -> dict[str, Any]:
    """What federated rounds say of a device; of one that took part in none, zeros."""
    if found is None:
        return {"suspect_rounds": 0, "judged_rounds": 0, "suspect_reason": "", "quarantine_advised": False}
    return {
        "suspect_rounds": found.suspect,
        "judged_rounds": found.rounds,
        "suspect_reason": found.reason,
        "quarantine_advised": found.advised,
    }


def _suspect(row: dict[str, Any]) -> str:
    if not row["suspect_rounds"]:
        return "no"
    share = f"{row['suspect_rounds']} of {row['judged_rounds']}"
    return f"{share}, quarantine?" if row["quarantine_advised"] and not row["quarantined_ns"] else share


def _standing(row: dict[str, Any]) -> str:
    if row["revoked_ns"]:
        return "revoked"
    return "quarantined" if row["quarantined_ns"] else "active"


def _total(counts: list[StreamCount]) -> dict[str, int]:
    return {
        "received": sum(count.received for count in counts),
        "lost": sum(count.lost for count in counts),
        "duplicated": sum(count.duplicated for count in counts),
    }


def _stream(count: StreamCount) -> dict[str, Any]:
    return asdict(count) | {"lost": count.lost}
