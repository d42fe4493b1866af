"""``wearfleet-cloud serve`` and ``doctor``, and the groups of commands that work on a service's state folder."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from wearfleet_cloud.cli import devices, federation, models, ring
from wearfleet_cloud.cli.state_options import (
    ConfigFile,
    Json,
    StateFolder,
    print_json,
    print_table,
    settings_of,
)

if TYPE_CHECKING:
    from wearfleet_cloud.service.state_dir import RunningService

__all__ = ["log_to_stderr", "register"]


def register(app: typer.Typer) -> None:
    """Add ``serve``, ``doctor``, ``devices``, ``federation``, ``models`` and ``ring`` to the command line."""
    app.command("serve")(serve)
    app.command("doctor")(doctor)
    for group in (devices, federation, models, ring):
        group.register(app)


def serve(
    *,
    config: ConfigFile = None,
    state: StateFolder = None,
    host: Annotated[
        str | None, typer.Option(help="Address to bind to; 127.0.0.1 unless told otherwise.")
    ] = None,
    public_host: Annotated[
        str | None, typer.Option(help="Name under which devices reach this machine.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="gRPC, mutual TLS; 0: any free.")] = None,
    enrol_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="gRPC, enrolment; 0: any free.")
    ] = None,
    web_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Live page and metrics.")] = None,
    broker: Annotated[
        str | None, typer.Option(help="URL of a broker that runs already, mqtts://host:port.")
    ] = None,
    broker_kind: Annotated[str | None, typer.Option(help="auto, mosquitto or embedded.")] = None,
    broker_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port of our own broker.")] = None,
    database: Annotated[
        str | None, typer.Option(help="SQLAlchemy URL; SQLite in the state folder unless told.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant of new devices.")] = None,
    source_name: Annotated[
        str | None, typer.Option(help="Data set behind the streams, shown on the page.")
    ] = None,
    simulated: Annotated[bool | None, typer.Option(help="Show the streams as simulated.")] = None,
    as_json: Json = False,
) -> None:
    """Run the service until Ctrl-C: gRPC, MQTT ingest, federated rounds, live page."""
    settings = settings_of(
        config,
        state,
        service={
            "host": host, "public_host": public_host, "port": port, "enrol_port": enrol_port, "web_port": web_port,
            "tenant": tenant, "source_name": source_name, "simulated": simulated,
        },
        broker={"url": broker, "kind": broker_kind, "port": broker_port},
        database={"url": database},
    )  # fmt: skip
    log_to_stderr()
    from wearfleet_cloud.service.serve import serve as run_service

    asyncio.run(run_service(settings, lambda running: _tell_ready(running, as_json)))


def _tell_ready(running: RunningService, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"ready": True, **asdict(running)}), flush=True)
        return
    Console().print(f"ready: page {running.web}, gRPC {running.cloud}, enrolment {running.enrol}")
    sys.stdout.flush()


def log_to_stderr() -> None:
    """Show what a long-running command does."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", handlers=[handler])
    logging.getLogger("wearfleet_cloud").setLevel(logging.INFO)


def doctor(config: ConfigFile = None, state: StateFolder = None, as_json: Json = False) -> None:
    """Check what the service needs, each with what to do about it; exit code 1 when something is missing."""
    from wearfleet_cloud.service.doctor import examine

    findings = examine(settings_of(config, state))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(
            ("check", "state", "detail", "what to do"),
            [(f.check, "ok" if f.ok else "FAILED", f.detail, f.hint) for f in findings],
        )
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)
