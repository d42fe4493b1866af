"""Make the runs of a benchmark: one after the other, or in several processes."""

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import torch
from wearfleet_protos.errors import WearfleetError

from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.dataset import Progress, silent
from wearfleet_cloud.data.prepared import Prepared, prepare
from wearfleet_cloud.data.scenarios import build_scenario
from wearfleet_cloud.training.benchmark.grid import Cell
from wearfleet_cloud.training.benchmark.rows import FAILURE_FILE
from wearfleet_cloud.training.checkpoint import write_atomically
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.run import Run, plan_run
from wearfleet_cloud.training.session import CHECKPOINT_FILE
from wearfleet_cloud.training.settings import held_out, run_settings
from wearfleet_cloud.training.stacked import stack_key, train_stacked
from wearfleet_cloud.training.trainer import RESULT_FILE, train

__all__ = ["Place", "Task", "in_processes", "one_by_one", "perform", "planned", "prepared", "tasks_of"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a benchmark reads and writes.

    Args:
        out: its folder; the runs are below ``runs``.
        data_root: folder with the distributions, None for simulated sets.
        cache_dir: of prepared data.
    """

    out: Path
    data_root: Path | None
    cache_dir: Path

    def folder(self, cell: Cell) -> Path:
        """Of the files of one run."""
        return self.out / "runs" / cell.id


@dataclass(frozen=True, slots=True)
class Task:
    """Runs that are made together: a stack, or a single one."""

    cells: tuple[Cell, ...]
    place: Place

    @property
    def folder(self) -> Path:
        """Of the checkpoint while they advance."""
        if len(self.cells) == 1:
            return self.place.folder(self.cells[0])
        return self.place.out / "stacks" / f"{self.cells[0].id}-{len(self.cells)}"


def tasks_of(cells: Sequence[Cell], place: Place, stack: int) -> list[Task]:
    """Cut a grid into tasks; depends on the whole grid alone, so that a benchmark that goes on makes the same stacks.

    Args:
        cells: the whole grid.
        place: of the benchmark.
        stack: how many runs advance together at most; 1 makes every run alone.
    """
    if stack == 1:
        return [Task((cell,), place) for cell in cells]
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(_key(cell, place), []).append(cell)
    return [
        Task(tuple(group[first : first + stack]), place)
        for group in groups.values()
        for first in range(0, len(group), stack)
    ]


def perform(task: Task, progress: Progress = silent) -> None:
    """Make the runs of a task and write their results; what goes wrong is written down as the result of its run."""
    runs: list[tuple[Cell, Run]] = []
    for cell in task.cells:
        try:
            runs.append((cell, planned(cell, task.place)))
        except Exception as error:  # noqa: BLE001 - one run must not end the benchmark
            _write_failure(task.place.folder(cell), error)
    try:
        if len(task.cells) == 1:
            for _, run in runs:
                train(run.scenario, run.algorithm, run.spec, run.config, run.folder, progress)
        elif runs:
            train_stacked([run for _, run in runs], task.folder, progress)
    except Exception as error:  # noqa: BLE001 - as above
        for cell, run in runs:
            if not (run.folder / RESULT_FILE).exists():
                _write_failure(task.place.folder(cell), error)
    (task.folder / CHECKPOINT_FILE).unlink(missing_ok=True)


def one_by_one(tasks: Sequence[Task], progress: Progress = silent) -> Iterator[Task]:
    """Make tasks in this process; yields each when it is done."""
    for task in tasks:
        perform(task, progress)
        yield task


def in_processes(tasks: Sequence[Task], workers: int) -> Iterator[Task]:
    """Make tasks in several processes, which end when this one ends in whatever way; yields each when it is done.

    Raises:
        WearfleetError: a process died.
    """
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        waiting = {pool.submit(perform, task): task for task in tasks}
        try:
            for done in as_completed(waiting):
                done.result()
                yield waiting[done]
        except BrokenProcessPool as error:
            raise WearfleetError(
                "a worker process died, perhaps for lack of memory; start the same command again, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def planned(cell: Cell, place: Place) -> Run:
    """The run of a cell.

    Raises:
        WearfleetError: as for ``train``.
    """
    data = prepared(cell.dataset, cell.scenario, place)
    scenario = build_scenario(cell.scenario, data, held_out(cell.target), cell.seed)
    config = TrainConfig(steps=cell.steps, seed=cell.seed, device=cell.device)
    spec, config = run_settings(data.dataset, cell.algorithm, config, cell.backbone, cell.settings)
    return plan_run(scenario, cell.algorithm, spec, config, place.folder(cell))


@lru_cache(maxsize=8)
def prepared(dataset: str, scenario: str, place: Place) -> Prepared:
    """A data set in the form that a scenario needs, opened once a process.

    Raises:
        DataError: the distribution is missing or malformed.
    """
    return prepare(dataset_named(dataset).for_scenario(scenario), place.data_root, place.cache_dir)


def _key(cell: Cell, place: Place) -> str:
    """Cells of one key advance together; a run that must be made alone has a key of its own."""
    try:
        return stack_key(planned(cell, place)) or cell.id
    except Exception:  # noqa: BLE001 - the task will meet and record the same error
        return cell.id


def _write_failure(folder: Path, error: Exception) -> None:
    _log.warning("%s: %s", folder.name, error)
    folder.mkdir(parents=True, exist_ok=True)
    document = {"error": f"{type(error).__name__}: {error}"}
    write_atomically(folder / FAILURE_FILE, (json.dumps(document, indent=2) + "\n").encode())


def _start_worker() -> None:
    """One thread a process, and an end when the benchmark's process is gone, even when it was killed."""
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
