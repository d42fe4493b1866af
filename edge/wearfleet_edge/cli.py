"""The command line ``wearfleet-edge``. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"wearfleet-edge needs the edge extra ({error}): pip install 'wearfleet[edge]'")

if TYPE_CHECKING:
    from wearfleet_edge.state import StateDirectory

__all__ = ["main"]

app = typer.Typer(
    name="wearfleet-edge",
    help="Agent of one device: streams, recognises, updates itself, learns.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

State = Annotated[Path, typer.Option("--state", help="Directory that belongs to this agent.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Speed = Annotated[float | None, typer.Option(help="1 is real time, 0 as fast as possible.", min=0.0)]
Share = Annotated[
    bool | None,
    typer.Option("--share-raw-windows/--keep-raw-windows", help="Send sensor windows, not only results."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, to standard error.")]

_DEFAULT_STATE = Path("wearfleet-device")


def main() -> None:
    """Entry point: runs a command; an error of ours becomes one line and its exit code."""
    from wearfleet_protos.errors import WearfleetError

    try:
        app()
    except WearfleetError as error:
        if "--json" in sys.argv:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@app.command()
def enrol(
    ticket: Annotated[str, typer.Argument(help="From: wearfleet-cloud devices enrol-code")],
    state: State = _DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Give this device its identity."""
    from wearfleet_edge.enrolment import enrol_device

    enrolled = enrol_device(_directory(state), ticket)
    facts = {
        "device_id": enrolled.device_id,
        "tenant": enrolled.tenant,
        "cloud_address": enrolled.cloud_address,
    }
    _show(facts, f"enrolled as {enrolled.device_id} of {enrolled.tenant}", as_json=as_json)


@app.command()
def run(
    *,
    state: State = _DEFAULT_STATE,
    recording: Annotated[Path | None, typer.Option(help="Replay this file as the sensor.")] = None,
    speed: Speed = None,
    repeat: Annotated[
        bool | None, typer.Option("--repeat/--no-repeat", help="Replay again at the end.")
    ] = None,
    share: Share = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Stream, recognise, update and learn until stopped."""
    _become_agent(
        state=state,
        recording=recording,
        speed=speed,
        repeat=repeat,
        share=share,
        once=False,
        as_json=as_json,
        verbose=verbose,
    )


@app.command()
def replay(
    recording: Annotated[Path, typer.Argument(help="File of recordings.")],
    *,
    state: State = _DEFAULT_STATE,
    speed: Speed = 1.0,
    share: Share = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Stream a recording once, wait until all of it is acknowledged, and end."""
    _become_agent(
        state=state,
        recording=recording,
        speed=speed,
        repeat=False,
        share=share,
        once=True,
        as_json=as_json,
        verbose=verbose,
    )


@app.command()
def status(state: State = _DEFAULT_STATE, as_json: Json = False) -> None:
    """Show what the agent last said about itself."""
    from wearfleet_protos.errors import NotFoundError

    from wearfleet_edge.state import read_json

    path = _directory(state).status
    if not path.exists():
        raise NotFoundError(f"{path}: no status; the agent has not run with this state directory yet")
    facts = read_json(path)
    _show(facts, _lines(facts), as_json=as_json)


@app.command()
def outbox(state: State = _DEFAULT_STATE, as_json: Json = False) -> None:
    """Show what waits for its acknowledgement."""
    import time

    from wearfleet_edge.outbox import inspect_outbox

    found = inspect_outbox(_directory(state).outbox)
    facts: dict[str, object] = {
        "depth": found.depth,
        "size_bytes": found.size_bytes,
        "oldest_age_s": round((time.time_ns() - found.oldest_ns) / 1e9, 3) if found.depth else 0.0,
        "appended": found.appended,
        "waiting": found.waiting,
        "acknowledged": {kind: found.acknowledged(kind) for kind in found.appended},
        "lost": found.lost,
    }
    _show(facts, _lines(facts), as_json=as_json)


@app.command()
def doctor(state: State = _DEFAULT_STATE, as_json: Json = False) -> None:
    """Check everything the agent needs and say what to do."""
    from wearfleet_edge.doctor import examine

    checks = examine(_directory(state))
    text = "\n".join(f"{'ok  ' if c.ok else 'FAIL'}  {c.name:<13} {c.detail}" for c in checks)
    facts = {"checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in checks]}
    _show(facts, text, as_json=as_json)
    if not all(c.ok for c in checks):
        raise typer.Exit(1)


def _become_agent(
    *,
    state: Path,
    recording: Path | None,
    speed: float | None,
    repeat: bool | None,
    share: bool | None,
    once: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    from wearfleet_edge.process import ProcessArguments, become_agent

    become_agent(
        ProcessArguments(
            state=str(state.resolve()),
            recording=None if recording is None else str(recording.resolve()),
            speed=speed,
            repeat=repeat,
            share_raw_windows=share,
            once=once,
            as_json=as_json,
            verbose=verbose,
        )
    )


def _directory(path: Path) -> StateDirectory:
    from wearfleet_edge.state import StateDirectory

    return StateDirectory(path)


def _lines(facts: dict[str, object]) -> str:
    width = max(len(name) for name in facts)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _show(facts: object, text: str, *, as_json: bool) -> None:
    print(json.dumps(facts) if as_json else text)


if __name__ == "__main__":
    main()
