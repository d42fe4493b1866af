"""``wearfleet-cloud models``: publish an exported model, and see what the fleet should run."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from wearfleet_protos.errors import NotFoundError

from wearfleet_cloud.cli.state_options import (
    ConfigFile,
    Json,
    StateFolder,
    opened,
    print_json,
    print_table,
    time_text,
)

__all__ = ["register"]

_group = typer.Typer(help="Publish and list models.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group ``models`` to the command line."""
    app.add_typer(_group, name="models")


@_group.command("list")
def list_models(config: ConfigFile = None, state: StateFolder = None, as_json: Json = False) -> None:
    """Every published version; the released one is what every device should run."""
    from wearfleet_cloud.storage import catalog

    with opened(config, state) as (_, service), service.database.read() as connection:
        published = catalog.list_models(connection)
        current = catalog.current_release(connection)
    rows: list[dict[str, Any]] = [asdict(model) | {"released": model == current} for model in published]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("model", "version", "published", "digest", "released"),
        [
            (
                r["model_id"],
                r["version"],
                time_text(r["published_ns"]),
                r["model_digest"],
                "yes" if r["released"] else "",
            )
            for r in rows
        ],
    )


@_group.command("publish")
def publish(
    *,
    model: Annotated[Path, typer.Argument(help="ONNX file written by `export`.")],
    manifest: Annotated[Path | None, typer.Option(help="Its manifest; beside it unless told.")] = None,
    release: Annotated[bool, typer.Option(help="Make it the one that every device should run.")] = True,
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Check, sign and store a model, and release it to the fleet."""
    from wearfleet_protos.manifest import ModelManifest

    description = manifest or model.with_suffix(".manifest.json")
    for file in (model, description):
        if not file.is_file():
            raise NotFoundError(f"{file} does not exist; `wearfleet-cloud export` writes both files")
    document = ModelManifest.from_bytes(description.read_bytes())
    with opened(config, state) as (_, service):
        published = service.registry.publish(model.read_bytes(), document, time.time_ns(), release=release)
    if as_json:
        print_json(asdict(published) | {"released": release})
        return
    print(f"{published.model_id} version {published.version} {'released' if release else 'stored'}")


@_group.command("show")
def show(
    model_id: Annotated[str, typer.Argument(help="A name of `models list`.")],
    version: Annotated[int | None, typer.Option(help="The newest unless told.")] = None,
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Json = False,
) -> None:
    """What a version is: labels, channels, rate, window, threshold, training run."""
    from wearfleet_cloud.storage.catalog import find_model

    with opened(config, state) as (_, service):
        with service.database.read() as connection:
            published = find_model(connection, model_id, version)
        manifest = service.registry.manifest(published.manifest_digest)
    row = {
        **asdict(published),
        "labels": list(manifest.contract.labels),
        "channels": [channel.name for channel in manifest.contract.channels],
        "rate_hz": manifest.contract.rate_hz,
        "window": manifest.contract.window,
        "stride": manifest.contract.stride,
        "size_bytes": manifest.size_bytes,
        "ood_method": manifest.ood_method,
        "ood_threshold": manifest.ood_threshold,
        "train_run": manifest.train_run,
        "license": manifest.license,
        "simulated": manifest.simulated,
    }
    if as_json:
        print_json(row)
        return
    print_table(("what", "value"), list(row.items()))
