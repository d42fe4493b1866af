"""``wearfleet-cloud data``: list, describe, fetch and simulate data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from wearfleet_protos.errors import ConfigError, DataError

if TYPE_CHECKING:
    from wearfleet_cloud.data.dataset import Dataset, Progress
    from wearfleet_cloud.data.prepared import Prepared

__all__ = ["progress_bars", "register"]

_group = typer.Typer(help="List, describe, fetch and simulate data sets.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A name of `data list`, or a .py file that defines DATASET.")]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root", envvar="WEARFLEET_DATA_ROOT", help="Folder that holds the official distributions."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def register(app: typer.Typer) -> None:
    """Add the group ``data`` to the command line."""
    app.add_typer(_group, name="data")


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A progress callback that draws one bar a task on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


@_group.command("list")
def list_data(data_root: DataRoot = None, as_json: Json = False) -> None:
    """Every known data set, and whether it is in the data root."""
    from wearfleet_cloud.data import DATASETS

    rows = [_summary(dataset) | {"found": _found(dataset, data_root)} for dataset in DATASETS.values()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(Column("name", no_wrap=True), "what", "classes", "channels", "Hz", "window", "found")
    for row in rows:
        cells = (
            row["name"],
            row["title"],
            len(row["labels"]),
            len(row["channels"]),
            row["rate_hz"],
            row["window"],
        )
        table.add_row(*(str(cell) for cell in cells), "yes" if row["found"] else "no")
    Console().print(table)


@_group.command("describe")
def describe(
    name: Name,
    *,
    data_root: DataRoot = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Cache of prepared data sets.")] = None,
    as_json: Json = False,
) -> None:
    """What a data set is and what was found of it: files, rows, people, windows of every class."""
    from wearfleet_cloud.data import dataset_named
    from wearfleet_cloud.data.prepared import counts_of, default_cache_dir, prepare

    dataset = dataset_named(name)
    cache = cache_dir or default_cache_dir()
    with progress_bars() as show:
        counts = counts_of(dataset, data_root, cache, show)
        prepared = prepare(dataset, data_root, cache, show)
    report = _summary(dataset) | {"counts": counts, "prepared": _windows(prepared)}
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = Console()
    console.print(f"[bold]{dataset.title}[/bold]{' (simulated)' if dataset.simulated else ''}")
    console.print(f"{dataset.citation}\nlicence: {dataset.license}\nnote: {dataset.notes}", markup=False)
    for title in ("counts", "prepared"):
        table = Table(title, "number")
        for key, value in _flat(report[title]):
            table.add_row(key, value)
        console.print(table)


@_group.command("fetch")
def fetch(
    name: Name,
    *,
    data_root: DataRoot = None,
    url: Annotated[
        str | None, typer.Option(help="Another address of the same archive, such as a mirror.")
    ] = None,
    sha256: Annotated[
        str | None, typer.Option(help="Expected digest, where none is known or it changed.")
    ] = None,
    max_mb: Annotated[int | None, typer.Option(min=1, help="Refuse a larger download.")] = None,
    as_json: Json = False,
) -> None:
    """Download the official distribution into the data root and verify it."""
    from wearfleet_cloud.data import dataset_named
    from wearfleet_cloud.data.download import fetch as download_archive

    dataset = dataset_named(name)
    if dataset.download is None:
        raise ConfigError(f"data set {name} has no official address; there is nothing to fetch")
    if data_root is None:
        raise ConfigError("give --data-root, the folder that is to hold the distribution")
    wanted = dataset.download
    wanted = replace(wanted, address=url or wanted.address, sha256=sha256 or wanted.sha256)
    if max_mb is not None:
        wanted = replace(wanted, max_bytes=max_mb << 20)
    with progress_bars() as show:
        path, digest = download_archive(wanted, data_root / dataset.name, show)
    report = {
        "file": str(path),
        "size_bytes": path.stat().st_size,
        "sha256": digest,
        "verified": bool(wanted.sha256),
    }
    if as_json:
        print(json.dumps(report))
        return
    checked = "as expected" if wanted.sha256 else "no published digest to compare with: note it down"
    Console().print(
        f"{path}: {report['size_bytes']} bytes, sha256 {digest} ({checked})\nlicence: {dataset.license}"
    )


@_group.command("simulate")
def simulate(
    *,
    out: Annotated[Path, typer.Option(help="Folder for one replay file a person.")],
    persons: Annotated[int, typer.Option(min=1)] = 8,
    sessions: Annotated[int, typer.Option(min=1, help="Days a person.")] = 2,
    bout_seconds: Annotated[float, typer.Option(min=5.0, help="Length of every bout of activity.")] = 30.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    label_noise: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of wrongly labelled bouts.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Simulate people and write what their sensors would have recorded (always marked as simulated)."""
    from wearfleet_protos.recording import save_recordings

    from wearfleet_cloud.data.simulator import Simulation, simulated_dataset

    simulation = Simulation(
        persons=persons, sessions=sessions, bout_s=bout_seconds, seed=seed, label_noise=label_noise
    )
    dataset = simulated_dataset(simulation)
    files = []
    with progress_bars() as show:
        for subject, own in groupby(dataset.reader.read(None, show), key=lambda recording: recording.subject):
            recordings = tuple(own)
            path = out / f"{dataset.name}-{subject}.npz"
            save_recordings(path, recordings, dataset.label_names)
            samples = sum(len(recording.samples) for recording in recordings)
            files.append(
                {"file": str(path), "subject": subject, "sessions": len(recordings), "samples": samples}
            )
    if as_json:
        print(json.dumps({"simulated": True, "rate_hz": dataset.rate_hz, "files": files}, indent=2))
        return
    Console().print(f"{len(files)} simulated people written to {out}: `wearfleet-edge replay` plays them")


def _summary(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "title": dataset.title,
        "citation": dataset.citation,
        "license": dataset.license,
        "simulated": dataset.simulated,
        "labels": list(dataset.label_names),
        "other_labels": list(dataset.other_labels),
        "channels": [[channel.name, channel.unit] for channel in dataset.channels],
        "rate_hz": dataset.rate_hz,
        "window": dataset.window,
        "stride": dataset.stride,
        "address": dataset.download.address if dataset.download else None,
        "notes": dataset.notes,
    }


def _found(dataset: Dataset, data_root: Path | None) -> bool:
    try:
        dataset.reader.fingerprint(data_root)
    except DataError:
        return False
    return True


def _windows(prepared: Prepared) -> dict[str, Any]:
    from wearfleet_cloud.data.dataset import UNKNOWN_SUBJECT
    from wearfleet_cloud.data.scenarios import person_groups, possible_scenarios

    labels = prepared.dataset.label_names
    by_class = [int((prepared.windows.activity == label).sum()) for label in range(len(labels))]
    unknown = UNKNOWN_SUBJECT in prepared.subjects
    return {
        "windows": len(prepared.windows),
        "recordings": len(prepared.entries),
        "subjects": 0 if unknown else len(prepared.subjects),
        "person_groups": [] if unknown else [list(group) for group in person_groups(prepared)],
        "scenarios": list(possible_scenarios(prepared)),
        "windows_by_class": dict(zip(labels, by_class, strict=True)),
    }


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of a table: nested names are joined, lists counted out."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}: {name}", number) for name, number in _flat(value))
        elif isinstance(value, list):
            groups = (group if isinstance(group, str) else ", ".join(group) for group in value)
            yield key, "; ".join(groups) or "none"
        else:
            yield key, str(value)
