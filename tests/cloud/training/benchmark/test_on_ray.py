"""Benchmarks on a cluster: against a stand-in for Ray that copies everything, and Ray itself where it is installed."""

from __future__ import annotations

import csv
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from wearfleet_cloud.training.benchmark import Execution, Grid, Place, benchmark
from wearfleet_cloud.training.benchmark.rows import TIME_COLUMNS
from wearfleet_protos.errors import ConfigError

_GRID = Grid(
    datasets=("people",),
    scenarios=("cross-person",),
    methods=("erm",),
    targets=("0", "9"),
    backbones=("cnn",),
    seeds=(0, 1),
    configurations=1,
    steps=4,
    settings=("batch=4", "evaluate_every=2"),
)


class _Remote:
    """A function that runs at once on copies of its arguments, as if on another machine."""

    def __init__(self, function: Callable) -> None:
        self._function = pickle.dumps(function)

    def options(self, *, num_gpus: int) -> _Remote:
        assert num_gpus == 0
        return self

    def remote(self, *arguments: object) -> bytes:
        given = pickle.loads(pickle.dumps(arguments))
        return pickle.dumps(pickle.loads(self._function)(*given))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    ray = ModuleType("ray")
    ray.init = lambda address, log_to_driver: calls.append(f"init {address}")
    ray.remote = _Remote
    ray.wait = lambda waiting, num_returns: (waiting[-num_returns:], waiting[:-num_returns])
    ray.get = pickle.loads
    ray.shutdown = lambda: calls.append("shutdown")
    monkeypatch.setitem(sys.modules, "ray", ray)
    return calls


@pytest.fixture
def grid(people: str) -> Grid:
    return replace(_GRID, datasets=(people,))


@pytest.fixture
def places(tmp_path: Path, cache: Path) -> tuple[Place, Place]:
    return Place(tmp_path / "here", None, cache), Place(tmp_path / "there", None, cache)


def _rows(out: Path) -> list[dict[str, str]]:
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{n: v for n, v in row.items() if n not in {"commit", *TIME_COLUMNS}} for row in rows]


def test_a_cluster_gives_the_rows_of_one_machine(
    grid: Grid, places: tuple[Place, Place], stand_in: list[str]
) -> None:
    here, there = places
    benchmark(grid, here, Execution())
    benchmark(grid, there, Execution(ray="head:6379"))
    assert stand_in == ["init head:6379", "shutdown"]
    assert _rows(there.out) == _rows(here.out)
    assert [bool(row["error"]) for row in _rows(there.out)] == [False, False, True, True]
    names = {path.relative_to(here.out).as_posix() for path in here.out.rglob("*")}
    assert {path.relative_to(there.out).as_posix() for path in there.out.rglob("*")} == names


def test_without_ray_the_error_says_what_to_install(
    grid: Grid, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'wearfleet\[cloud,ray\]'"):
        benchmark(replace(grid, targets=("0",)), place, Execution(ray="auto"))
    with pytest.raises(ConfigError, match="give one of them"):
        Execution(workers=2, ray="auto")


@pytest.mark.e2e
def test_real_ray_gives_the_rows_of_one_machine(grid: Grid, places: tuple[Place, Place]) -> None:
    here, there = places
    benchmark(grid, here, Execution())
    benchmark(grid, there, Execution(ray="local"))
    assert _rows(there.out) == _rows(here.out)
