"""What a grid holds, and what its configurations are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_cases import batch, build, hyper, started
from wearfleet_cloud.algorithms import ALGORITHMS
from wearfleet_cloud.data.simulator import SIMULATOR
from wearfleet_cloud.training.benchmark.grid import Cell, Grid, cells
from wearfleet_cloud.training.benchmark.ranges import RANGES, drawn_settings
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.optimisers import Adam
from wearfleet_cloud.training.settings import run_settings
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


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_method_accepts_what_is_drawn_for_it(name: str) -> None:
    """20 draws make a network and a configuration; the first two also a step that is finite."""
    for number in range(1, 21):
        drawn = drawn_settings(name, number, frozenset())
        spec, config = run_settings(SIMULATOR, name, TrainConfig(), "cnn", drawn)
        algorithm = build(name, Adam(), config.options)
        assert set(config.hyper) <= set(algorithm.info.hyper)
        assert spec.classes == len(SIMULATOR.label_names)
        if number < 3:
            values = {key: torch.tensor(float(value)) for key, value in config.hyper.items()}
            given = {**hyper(algorithm), **values, "lr": torch.tensor(config.lr)}
            state, _ = algorithm.step(started(algorithm), batch(algorithm), given, torch.tensor(number))
            assert all(bool(torch.isfinite(p).all()) for p in state.params.values())


def test_every_setting_is_searched_but_those_of_schedules_modes_and_forms() -> None:
    kept = {
        "mode", "pairing", "bandwidths", "method", "form", "features@sot",
        "teacher_steps", "average_from", "radius_passes", "inner_lr", "entropy", "smoothing",
    }  # fmt: skip
    for name, kind in ALGORITHMS.items():
        own = {s for s in (*kind.info.hyper, *kind.info.options) if not {s, f"{s}@{name}"} & kept}
        assert own == set(RANGES.get(name, {})), name


def test_a_choice_is_drawn_from_all_its_values() -> None:
    drawn = [dict(s.split("=") for s in drawn_settings("diversify", n, frozenset())) for n in range(1, 100)]
    assert {one["latent_domains"] for one in drawn} == {"2", "3", "5", "10", "20"}
    assert {one["local_passes"] for one in drawn} == {"1", "3", "5", "10", "30"}
    assert {float(one["reversal"]) for one in drawn} == {0.1, 1.0, 10.0}


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
