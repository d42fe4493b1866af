"""Options and output that the commands around a service's state folder share."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from wearfleet_cloud.config import Settings
    from wearfleet_cloud.service.state import State

__all__ = [
    "ConfigFile",
    "Json",
    "StateFolder",
    "opened",
    "print_json",
    "print_table",
    "settings_of",
    "time_text",
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings file in TOML.")]
StateFolder = Annotated[Path | None, typer.Option("--state", help="State folder of the service.")]


def settings_of(config: Path | None, state: Path | None, **flags: dict[str, Any]) -> Settings:
    """Settings from file, environment and flags; flags that are None were not given.

    Raises:
        ConfigError: something in them is wrong.
    """
    from wearfleet_cloud.config import load_settings

    sections = {"service": {"state_dir": state}, **flags}
    sections["service"] = {"state_dir": state, **sections["service"]}
    given = {
        section: {key: value for key, value in keys.items() if value is not None}
        for section, keys in sections.items()
    }
    return load_settings(config, {section: keys for section, keys in given.items() if keys})


@contextmanager
def opened(config: Path | None, state: Path | None) -> Iterator[tuple[Settings, State]]:
    """The state of a service, for a command that works on it.

    Raises:
        ConfigError: it cannot be opened.
    """
    from wearfleet_cloud.service.state import open_state

    settings = settings_of(config, state)
    opened_state = open_state(settings)
    try:
        yield settings, opened_state
    finally:
        opened_state.database.close()


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))


def print_table(columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """A table on standard output."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


def time_text(ns: int | None) -> str:
    """A time for people, in UTC."""
    if not ns:
        return "-"
    return dt.datetime.fromtimestamp(ns * 1e-9, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
