"""Whole benchmarks on simulated people: rows, tables, failures, and a process that is killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from wearfleet_cloud.training.benchmark import Execution, Grid, Place, benchmark
from wearfleet_cloud.training.benchmark.pictures import chosen_cells, draw_comparisons, draw_runs
from wearfleet_cloud.training.benchmark.rows import COLUMNS, TIME_COLUMNS
from wearfleet_protos.errors import ConfigError, ConflictError


@pytest.fixture
def grid(people: str) -> Grid:
    return Grid(
        datasets=(people,),
        scenarios=("cross-person", "cross-position"),
        methods=("erm", "mixup:pairing=domain"),
        targets=("0", "2"),
        backbones=("cnn",),
        seeds=(0, 1),
        configurations=1,
        steps=10,
        settings=("batch=4", "evaluate_every=5"),
    )


def _rows(out: Path) -> list[dict[str, str]]:
    """The table without what may differ: times, and the commit (somebody may commit while the tests run)."""
    with (out / "runs.csv").open() as file:
        return [
            {name: value for name, value in row.items() if name not in {"commit", *TIME_COLUMNS}}
            for row in csv.DictReader(file)
        ]


def test_a_benchmark_writes_one_row_a_run_and_one_table_a_rule(grid: Grid, place: Place) -> None:
    rows = list(benchmark(grid, place, Execution()).values())
    written = _rows(place.out)
    assert len(rows) == len(written) == 8
    assert [(r["method"], r["target"], r["seed"]) for r in written] == [
        (m, t, s) for m in grid.methods for t in "02" for s in "01"
    ]
    for row in written:
        result = json.loads((place.out / "runs" / row["id"] / "result.json").read_text())
        assert float(row["source_validation_target_accuracy"]) == result["target_accuracy"]
        assert float(row["oracle_score"]) == result["target_accuracy"]
        assert (row["simulated"], row["kept_by"], row["error"]) == ("True", "source-validation", "")
        assert all(row[name] for name in COLUMNS if name not in {"error", "mode", "commit", *TIME_COLUMNS})
        assert not (place.out / "runs" / row["id"] / "checkpoint.safetensors").exists()
    tables = {
        rule: (place.out / f"table-{rule}.md").read_text()
        for rule in ("source-validation", "mixup-validation", "oracle")
    }
    for rule, text in tables.items():
        assert f"selection by {rule}" in text
        assert not any(other in text for other in tables if other != rule)
        assert "people.py (simulated), cross-person, cnn" in text
        assert "| mixup:pairing=domain |" in text
    assert "upper bound" in tables["oracle"]
    assert "upper bound" not in tables["source-validation"]


@pytest.mark.slow
def test_runs_that_were_chosen_are_drawn(grid: Grid, place: Place) -> None:
    finished = benchmark(replace(grid, methods=("erm", "coral"), seeds=(1, 0)), place, Execution())
    cells = chosen_cells(finished)
    assert [(cell.method, cell.target, cell.seed) for cell in cells] == [
        (m, t, 1) for m in ("erm", "coral") for t in "02"
    ]
    files = draw_comparisons(list(finished.values()), place.out)
    assert [file.name for file in files] == [
        f"ranks-{rule}.png" for rule in ("source-validation", "mixup-validation", "oracle")
    ]
    files += draw_runs(finished, place, ["coral"], "pca")
    assert len(files) == 3 + 2 * 2
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    with pytest.raises(ConfigError, match="no method 'dann'"):
        draw_runs(finished, place, ["dann"], "pca")


@pytest.mark.slow
def test_the_command_of_a_row_makes_the_same_run(grid: Grid, place: Place, tmp_path: Path) -> None:
    import shlex

    rows = benchmark(
        replace(grid, methods=("mixup",), configurations=2, seeds=(3,), targets=("1",)), place, Execution()
    )
    row = list(rows.values())[1]
    words = shlex.split(row["command"].replace("DIR", str(tmp_path / "again")))
    _run([*words[1:], "--cache-dir", str(place.cache_dir), "--json"])
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["hyper"] == json.loads(row["hyper"])
    assert again["split_hash"] == row["split_hash"]
    assert str(again["target_accuracy"]) == row["source_validation_target_accuracy"]
    assert (
        str(again["selections"]["mixup-validation"]["mixup_validation_accuracy"])
        == row["mixup_validation_score"]
    )


def test_a_grid_may_grow_and_finished_runs_are_not_made_again(grid: Grid, place: Place) -> None:
    benchmark(replace(grid, methods=("erm",), seeds=(1,)), place, Execution())
    before = {p: p.stat().st_mtime_ns for p in place.out.glob("runs/*/result.json")}
    made: list[int] = []
    benchmark(
        replace(grid, methods=("erm",)),
        place,
        Execution(),
        lambda what, done, _n: made.append(done) if what == "training" else None,
    )
    assert len(made) == 2 * grid.steps
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert [row["seed"] for row in _rows(place.out)] == ["0", "1", "0", "1"]
    with pytest.raises(ConflictError, match="other steps, settings or device"):
        benchmark(replace(grid, steps=11), place, Execution())


def test_a_run_that_fails_is_a_row_with_its_reason_and_is_tried_again(grid: Grid, place: Place) -> None:
    small = replace(grid, methods=("erm",), targets=("0", "9"), seeds=(0,))
    rows = list(benchmark(small, place, Execution()).values())
    assert [bool(row["error"]) for row in rows] == [False, True]
    assert "expected one of the groups 0 to 2, got target 9" in rows[1]["error"]
    assert "## Runs that failed" in (place.out / "table-oracle.md").read_text()
    assert list(benchmark(small, place, Execution()).values()) == rows


@pytest.mark.slow
def test_stacked_runs_give_the_rows_of_single_ones(grid: Grid, place: Place) -> None:
    # Two windows fewer or more may be right: stacked sums have another order.
    alone = benchmark(grid, place, Execution()).values()
    other = replace(place, out=place.out.parent / "stacked")
    together = benchmark(grid, other, Execution(stack=4)).values()
    assert [row["stacked"] for row in together] == ["4"] * 8
    for one, two in zip(alone, together, strict=True):
        assert one["id"] == two["id"]
        assert one["split_hash"] == two["split_hash"]
        windows = int(one["target_windows"])
        found = [float(row["source_validation_target_accuracy"]) for row in (one, two)]
        assert abs(found[0] - found[1]) <= 2.5 / windows or one["oracle_step"] != two["oracle_step"]


def test_a_folder_belongs_to_one_process(grid: Grid, place: Place) -> None:
    def meddle(_what: str, done: int, _total: int) -> None:
        if done == 1:
            with pytest.raises(ConflictError, match="another benchmark is writing"):
                benchmark(grid, place, Execution())

    benchmark(replace(grid, methods=("erm",), targets=("0",), seeds=(0,)), place, Execution(), meddle)


def test_nothing_to_do_is_an_error(grid: Grid, place: Place) -> None:
    with pytest.raises(ConfigError, match="can give any of the scenarios"):
        benchmark(replace(grid, scenarios=("cross-position",)), place, Execution())
    with pytest.raises(ConfigError, match="at least 1"):
        Execution(workers=0)


def _arguments(grid: Grid, place: Place, workers: int) -> list[str]:
    options = {
        "datasets": ",".join(grid.datasets),
        "algorithms": ",".join(grid.methods),
        "targets": ",".join(grid.targets),
        "seeds": ",".join(map(str, grid.seeds)),
        "steps": str(grid.steps),
        "workers": str(workers),
        "out": str(place.out),
        "cache-dir": str(place.cache_dir),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return ["benchmark", *words, *(word for s in grid.settings for word in ("--set", s)), "--json"]


_MAIN = "from wearfleet_cloud.cli import main; main()"


def _run(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _MAIN, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_benchmark_goes_on_to_the_same_rows(grid: Grid, place: Place, workers: int) -> None:
    whole, broken = replace(place, out=place.out / "whole"), replace(place, out=place.out / "broken")
    report = json.loads(_run(_arguments(grid, whole, 1)))
    assert (report["runs"], report["failed"]) == (8, 0)
    for finished in (0, 3, 6):
        process = subprocess.Popen([sys.executable, "-c", _MAIN, *_arguments(grid, broken, workers)])
        deadline = time.monotonic() + 90
        while len(list(broken.out.glob("runs/*/result.json"))) <= finished and time.monotonic() < deadline:
            if finished == 0 and list(broken.out.glob("runs/*/metrics.jsonl")):
                break  # in the middle of the first run
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    left = json.loads(_run(_arguments(grid, broken, workers)))
    assert left["runs"] == 8
    assert _rows(broken.out) == _rows(whole.out)
    models = [sorted(out.glob("runs/*/model.safetensors")) for out in (whole.out, broken.out)]
    assert len(models[0]) == 8
    assert [m.read_bytes() for m in models[0]] == [m.read_bytes() for m in models[1]]
