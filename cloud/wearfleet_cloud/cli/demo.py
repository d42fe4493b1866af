"""``wearfleet-cloud demo``: the whole loop on this machine."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``demo`` to the command line."""
    app.command("demo")(demo)


def demo(
    *,
    dataset: Annotated[
        str, typer.Option(help="simulator, hapt, usc-had, or another of `data list`.")
    ] = "simulator",
    data_root: Annotated[Path | None, typer.Option(help="Folder with the official distributions.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=100, help="Training steps of each algorithm.")] = 600,
    rounds: Annotated[int, typer.Option(min=5, help="Federated rounds.")] = 6,
    stream_seconds: Annotated[float, typer.Option(min=5.0, help="Length of the replay of a person.")] = 45.0,
    web_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the live page, 0: any free.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the page up until Ctrl-C.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, progress to stderr.")
    ] = False,
) -> None:
    """Train, export, enrol, stream, recognise, federate, personalise, and show it live."""
    from rich.console import Console

    from wearfleet_cloud.demo import DemoSettings, print_summary, run_demo

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=as_json)
    settings = DemoSettings(
        dataset=dataset,
        data_root=data_root,
        out=out.absolute(),
        steps=steps,
        rounds=rounds,
        stream_s=stream_seconds,
        web_port=web_port,
        keep=keep,
        seed=seed,
    )
    summary = run_demo(settings, console)
    print_summary(summary, console, settings.out)
    if as_json:
        print(json.dumps(summary, indent=2))
