"""A whole benchmark: a grid of runs, one row each, tables and plots; goes on where it was interrupted."""

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from wearfleet_protos.errors import ConfigError, ConflictError, DataError

from wearfleet_cloud.data.dataset import Progress, silent
from wearfleet_cloud.data.domains import DIVISIONS
from wearfleet_cloud.training.benchmark.execution import (
    Place,
    Task,
    in_processes,
    one_by_one,
    prepared,
    tasks_of,
)
from wearfleet_cloud.training.benchmark.grid import Cell, Grid, cells
from wearfleet_cloud.training.benchmark.on_ray import on_ray
from wearfleet_cloud.training.benchmark.rows import FAILURE_FILE, Row, read_row, write_rows
from wearfleet_cloud.training.benchmark.tables import markdown
from wearfleet_cloud.training.checkpoint import write_atomically
from wearfleet_cloud.training.selection import RULES

__all__ = ["Execution", "Grid", "Place", "benchmark"]

_EVERY_S = 5.0
"""Seconds between two writings of the table."""


@dataclass(frozen=True, slots=True)
class Execution:
    """How the runs are made.

    Args:
        workers: processes; 1 makes the runs in this one.
        stack: runs that advance together at most.
        ray: address of a Ray cluster that makes them, empty for this machine.

    Raises:
        ConfigError: a number below one, or workers beside a cluster.
    """

    workers: int = 1
    stack: int = 1
    ray: str = ""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.stack < 1:
            raise ConfigError(f"workers and stack must be at least 1, got {self.workers} and {self.stack}")
        if self.ray and self.workers > 1:
            raise ConfigError("--workers is for this machine, --ray for a cluster; give one of them")


def benchmark(grid: Grid, place: Place, how: Execution, progress: Progress = silent) -> dict[Cell, Row]:
    """Make every run of a grid that is not made yet, and write ``runs.csv`` and the tables.

    Args:
        grid: what is compared.
        place: where it reads and writes.
        how: the runs are made.
        progress: called with ("runs", finished, all), and with ("training", ...) as ``train`` does.

    Returns:
        The row of every run, in the order of the grid.

    Raises:
        ConfigError: no data set can give any of the scenarios, or a bad target.
        ConflictError: the folder holds a benchmark of other settings, or another process is at it.
    """
    place.out.mkdir(parents=True, exist_ok=True)
    with _alone(place.out):
        _check_same(grid, place.out)
        wanted = list(cells(grid, lambda dataset, scenario: _domains(dataset, scenario, place)))
        if not wanted:
            raise ConfigError("none of the data sets can give any of the scenarios; see: data describe")
        _forget_failures(wanted, place)
        done = {cell: row for cell in wanted if (row := read_row(cell, place.folder(cell))) is not None}
        tasks = [
            task
            for task in tasks_of(wanted, place, how.stack)
            if not all(cell in done for cell in task.cells)
        ]
        written = 0.0
        progress("runs", len(done), len(wanted))
        for task in _performed(tasks, how, progress):
            for cell in task.cells:
                row = read_row(cell, place.folder(cell))
                if row is not None:
                    done[cell] = row
            progress("runs", len(done), len(wanted))
            if time.monotonic() - written > _EVERY_S:
                write_rows([done[cell] for cell in wanted if cell in done], place.out / "runs.csv")
                written = time.monotonic()
        finished = {cell: done[cell] for cell in wanted}
        rows = list(finished.values())
        write_rows(rows, place.out / "runs.csv")
        for rule in RULES:
            write_atomically(place.out / f"table-{rule}.md", markdown(rows, rule).encode())
        return finished


def _performed(tasks: Sequence[Task], how: Execution, progress: Progress) -> Iterator[Task]:
    if how.ray:
        return on_ray(tasks, how.ray)
    if how.workers == 1:
        return one_by_one(tasks, progress)
    return in_processes(tasks, how.workers)


def _domains(dataset: str, scenario: str, place: Place) -> int:
    data = prepared(dataset, scenario, place)
    try:
        return len(DIVISIONS[scenario](data))
    except DataError:
        return 0


def _forget_failures(wanted: Sequence[Cell], place: Place) -> None:
    """Runs that failed are tried again: the reason may be gone."""
    for cell in wanted:
        (place.folder(cell) / FAILURE_FILE).unlink(missing_ok=True)


def _check_same(grid: Grid, out: Path) -> None:
    """A folder holds runs of one length and one set of settings; the rest of a grid may grow."""
    file = out / "grid.json"
    own = {"steps": grid.steps, "settings": list(grid.settings), "device": grid.device}
    if file.is_file():
        before = json.loads(file.read_text())
        if {name: before.get(name) for name in own} != own:
            raise ConflictError(
                f"{out} holds a benchmark with other steps, settings or device; choose another folder"
            )
    write_atomically(file, (json.dumps(asdict(grid), indent=2) + "\n").encode())


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases however the process ends."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConflictError(
                f"another benchmark is writing into {out}; wait for it or choose another folder"
            ) from error
        yield
