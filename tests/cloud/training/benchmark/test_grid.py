"""What a grid holds, and what its configurations are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from wearfleet_cloud.algorithms import ALGORITHMS
from wearfleet_cloud.training.benchmark.grid import Cell, Grid, cells
from wearfleet_cloud.training.benchmark.ranges import RANGES, drawn_settings
from wearfleet_protos.errors import ConfigError

_GRID = Grid(
    datasets=("hapt", "usc-had"),
    scenarios=("cross-person", "cross-position"),
    methods=("erm", "mixup:pairing=domain"),
    targets=(),
    backbones=("cnn",),
    seeds=(0, 42),
    configurations=2,
    steps=10,
    settings=("lr=0.005", "alpha=0.3"),
)
_DOMAINS = {("hapt", "cross-person"): 5, ("usc-had", "cross-person"): 4}


def _cells(grid: Grid) -> list[Cell]:
    return list(cells(grid, lambda dataset, scenario: _DOMAINS.get((dataset, scenario), 0)))


def test_every_combination_that_the_data_can_give_is_there_once() -> None:
    found = _cells(_GRID)
    assert len(found) == (5 + 4) * 2 * 2 * 2  # domains, methods, configurations, seeds
    assert len({cell.id for cell in found}) == len(found)
    assert {cell.scenario for cell in found} == {"cross-person"}
    assert [cell.target for cell in _cells(replace(_GRID, targets=("3,8",), datasets=("hapt",)))] == [
        "3,8"
    ] * 8


def test_settings_reach_the_methods_that_have_them_and_are_not_drawn() -> None:
    erm, mixup = (
        next(c for c in _cells(_GRID) if c.method == m and c.configuration == 1) for m in _GRID.methods
    )
    assert erm.settings[:1] == ("lr=0.005",)
    assert mixup.settings[:3] == ("lr=0.005", "alpha=0.3", "pairing=domain")
    assert [s.partition("=")[0] for s in mixup.settings] == ["lr", "alpha", "pairing", "batch"]


def test_the_first_configuration_is_the_defaults_and_others_share_what_methods_have_in_common() -> None:
    assert drawn_settings("coral", 0, frozenset()) == ()
    for number in range(1, 5):
        coral, vrex = (drawn_settings(name, number, frozenset()) for name in ("coral", "vrex"))
        assert coral[:2] == vrex[:2]
    assert len({drawn_settings("erm", number, frozenset()) for number in range(20)}) == 20


def test_draws_stay_in_their_ranges() -> None:
    drawn = [dict(s.split("=") for s in drawn_settings("fishr", n, frozenset())) for n in range(1, 200)]
    values = {name: np.array([float(one[name]) for one in drawn]) for name in drawn[0]}
    limits = {
        "lr": (10**-4.5, 10**-2.5),
        "batch": (8, 45),
        "lam": (10, 1e4),
        "anneal_steps": (0, 5000),
        "ema": (0.9, 0.99),
    }
    assert values.keys() == limits.keys()
    for name, (low, high) in limits.items():
        assert low <= values[name].min() < values[name].max() <= high
    assert abs(np.median(np.log10(values["lr"])) + 3.5) < 0.3  # the logarithm is uniform


def test_ranges_are_of_hyper_parameters_that_exist() -> None:
    for name, ranges in RANGES.items():
        assert set(ranges) <= set(ALGORITHMS[name].info.hyper), name


def test_the_command_makes_the_run_again() -> None:
    cell = next(c for c in _cells(_GRID) if c.method.startswith("mixup") and c.configuration == 0)
    assert cell.command() == (
        "wearfleet-cloud train --dataset hapt --scenario cross-person --target 0 --algorithm mixup --backbone cnn "
        "--steps 10 --seed 0 --device cpu --set lr=0.005 --set alpha=0.3 --set pairing=domain --out DIR"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets": ()}, "needs datasets"),
        ({"seeds": (1, 1)}, "needs seeds, each once"),
        ({"methods": ("ermm",)}, "unknown algorithm 'ermm'"),
        ({"methods": ("erm:gamma=1",)}, "erm has no setting 'gamma=1'"),
        ({"methods": ("mixup:pairing",)}, "has no setting 'pairing'"),
        ({"settings": ("gamma=1",)}, "no method has a setting 'gamma=1'"),
        ({"configurations": 0}, "at least 1 configuration"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(_GRID, **change)
