"""Command ``benchmark``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from wearfleet_cloud.data.dataset import Progress
    from wearfleet_cloud.training.benchmark.execution import Place
    from wearfleet_cloud.training.benchmark.grid import Cell
    from wearfleet_cloud.training.benchmark.rows import Row
    from wearfleet_cloud.training.benchmark.run_figures import Projection

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("benchmark")(_benchmark)


def _benchmark(
    *,
    datasets: Annotated[str, typer.Option("--datasets", help="Names or .py files, with commas.")],
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder of the benchmark; an interrupted or smaller one there goes on."),
    ],
    scenarios: Annotated[str, typer.Option("--scenarios", help="With commas.")] = "cross-person",
    algorithms: Annotated[
        str,
        typer.Option(
            "--algorithms", help="With commas; name:option=value for one that is not as by default."
        ),
    ] = "erm",
    targets: Annotated[str, typer.Option("--targets", help="Held-out domains, with commas, or all.")] = "all",
    backbones: Annotated[str, typer.Option("--backbones", help="With commas.")] = "cnn",
    seeds: Annotated[str, typer.Option("--seeds", help="With commas.")] = "0,1,2",
    configs: Annotated[
        int,
        typer.Option(
            "--configs", min=1, help="Hyper-parameter settings a method: defaults, then drawn ones."
        ),
    ] = 1,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates a run.")] = 3000,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value for all methods that have it; repeatable."),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            "--data-root", envvar="WEARFLEET_DATA_ROOT", help="Folder with the official distributions."
        ),
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="Folder of prepared data.")] = None,
    device: Annotated[str, typer.Option("--device", help="Of torch: cpu, cuda, cuda:1.")] = "cpu",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes on this machine.")] = 1,
    stack: Annotated[
        int, typer.Option("--stack", min=1, help="Runs that advance together; pays on a GPU.")
    ] = 1,
    ray: Annotated[
        str,
        typer.Option("--ray", help="Address of a Ray cluster that makes the runs: host:port, auto, local."),
    ] = "",
    show: Annotated[
        str, typer.Option("--show", help="Methods whose confusions and features are drawn, with commas.")
    ] = "",
    projection: Annotated[str, typer.Option("--projection", help="Of the features: pca or tsne.")] = "pca",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and no progress.")] = False,
) -> None:
    """Compare algorithms on a grid of data sets, scenarios, targets, configurations and seeds."""
    from wearfleet_protos.errors import ConfigError

    from wearfleet_cloud.data.prepared import default_cache_dir
    from wearfleet_cloud.training.benchmark import Execution, Grid, Place, benchmark
    from wearfleet_cloud.training.benchmark.run_figures import PROJECTIONS

    if projection not in PROJECTIONS:
        raise ConfigError(f"unknown projection {projection!r}; known: {', '.join(PROJECTIONS)}")
    how = Execution(workers, stack, ray)
    grid = Grid(
        datasets=_names(datasets),
        scenarios=_names(scenarios),
        methods=_names(algorithms),
        targets=() if targets == "all" else _names(targets),
        backbones=_names(backbones),
        seeds=_numbers(seeds),
        configurations=configs,
        steps=steps,
        settings=tuple(settings or ()),
        device=device,
    )
    place = Place(out, data_root, cache_dir or default_cache_dir())
    with _progress(as_json) as progress:
        finished = benchmark(grid, place, how, progress)
        pictures = _pictures(finished, place, _names(show), PROJECTIONS[projection], progress)
    failed = sum(bool(row["error"]) for row in finished.values())
    if as_json:
        print(json.dumps({"out": str(out), "runs": len(finished), "failed": failed, "pictures": pictures}))
        return
    print((out / "table-source-validation.md").read_text())
    print(
        f"{len(finished)} runs, {failed} failed: {out / 'runs.csv'}; one table a selection rule and ", end=""
    )
    print(f"{len(pictures)} pictures beside it")


def _pictures(
    finished: dict[Cell, Row],
    place: Place,
    methods: tuple[str, ...],
    projection: Projection,
    progress: Progress,
) -> list[str]:
    from wearfleet_cloud.training.benchmark.pictures import draw_comparisons, draw_runs

    files = draw_comparisons(list(finished.values()), place.out)
    files += draw_runs(finished, place, methods, projection, progress)
    return [file.name for file in files]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    from wearfleet_protos.errors import ConfigError

    try:
        return tuple(int(number) for number in _names(text))
    except ValueError as error:
        raise ConfigError(f"seeds are whole numbers with commas, got {text!r}") from error


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A bar over all runs with the time left, and one over the steps of the present run."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    from wearfleet_cloud.data.dataset import silent

    if quiet:
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        names = ("runs", "training", "pictures")
        tasks = {name: bars.add_task(name, total=None, left="", visible=name == "runs") for name in names}
        began = time.monotonic()
        first: list[int] = []

        def show(what: str, done: int, total: int) -> None:
            left = ""
            if what == "runs":
                first[:] = first or [done]
                left = _time_left(time.monotonic() - began, done - first[0], total - done)
            bars.update(tasks[what], completed=done, total=total, left=left, visible=True)

        yield show


def _time_left(spent_s: float, made: int, missing: int) -> str:
    """How long the missing runs will take at the pace so far."""
    if made == 0:
        return ""
    minutes, seconds = divmod(round(spent_s / made * missing), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left"
