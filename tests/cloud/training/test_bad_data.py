"""What training does with data and settings that are not as they should be: it goes on sensibly, or says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from wearfleet_cloud.algorithms import ALGORITHMS
from wearfleet_cloud.data.prepared import Prepared
from wearfleet_cloud.data.scenarios import Domain, Scenario, cross_person
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.run import plan_run
from wearfleet_cloud.training.stacked import train_stacked
from wearfleet_cloud.training.trainer import TrainResult, model_spec_for, train
from wearfleet_protos.errors import ConfigError, DataError, NotFoundError

_CONFIG = TrainConfig(steps=6, batch=8, evaluate_every=3)
_LOST = 2
"""The class that is missing or rare."""


def _kept(domain: Domain, keep: np.ndarray) -> Domain:
    return replace(domain, x=domain.x[keep], y=domain.y[keep], index=domain.index[keep])


def _without(domain: Domain) -> Domain:
    return _kept(domain, domain.y != _LOST)


def _with_one(domain: Domain) -> Domain:
    keep = domain.y != _LOST
    keep[np.flatnonzero(domain.y == _LOST)[0]] = True
    return _kept(domain, keep)


def _train(
    scenario: Scenario, out: Path, algorithm: str = "erm", config: TrainConfig = _CONFIG
) -> TrainResult:
    return train(scenario, algorithm, model_spec_for(scenario.prepared.dataset), config, out)


def _rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [_without, _with_one], ids=["only in the target", "one window in a source"]
)
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_a_class_that_sources_hardly_know_stops_no_algorithm(
    small_people: Prepared, tmp_path: Path, algorithm: str, change: Callable[[Domain], Domain]
) -> None:
    whole = cross_person(small_people, 0)
    rest = tuple(_without(domain) for domain in whole.sources[1:])
    scenario = replace(whole, sources=(change(whole.sources[0]), *rest))
    # DIFEX's teacher makes 1000 steps unless it is told otherwise, which would be most of this test's time
    hyper = {name: 20.0 for name in ALGORITHMS[algorithm].info.hyper if name == "teacher_steps"}
    result = _train(scenario, tmp_path, algorithm, replace(_CONFIG, hyper=hyper))
    assert all(np.isfinite(row["loss"]) for row in _rows(tmp_path))
    confusion = np.array(result.summary["target_confusion"])
    assert confusion.sum() == len(scenario.target)
    assert confusion[_LOST].sum() == (scenario.target.y == _LOST).sum() > 0  # counted, and counted as wrong


def test_a_class_only_in_the_target_is_never_right(small_people: Prepared, tmp_path: Path) -> None:
    whole = cross_person(small_people, 0)
    scenario = replace(whole, sources=tuple(map(_without, whole.sources)))
    result = _train(scenario, tmp_path, config=replace(_CONFIG, steps=60, evaluate_every=20, lr=3e-3))
    confusion = np.array(result.summary["target_confusion"])
    assert confusion[_LOST, _LOST] == 0
    assert result.target_accuracy == confusion.diagonal().sum() / confusion.sum()


@pytest.mark.parametrize("where", ["source", "target"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_windows_that_are_not_finite_are_refused_before_anything_is_written(
    small_people: Prepared, tmp_path: Path, where: str, value: float
) -> None:
    scenario = cross_person(small_people, 0)
    domain = scenario.target if where == "target" else scenario.sources[1]
    x = domain.x.copy()
    x[3, 4, 5] = x[7, 0] = value  # one sample of one window, one whole channel of another
    broken = replace(domain, x=x)
    if where == "target":
        scenario = replace(scenario, target=broken)
    else:
        scenario = replace(scenario, sources=(scenario.sources[0], broken, *scenario.sources[2:]))
    with pytest.raises(DataError, match=f"2 of {len(domain)} windows of {domain.name} hold NaN or infinity"):
        _train(scenario, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_domain_too_small_to_validate_on_is_refused_with_advice(
    small_people: Prepared, tmp_path: Path
) -> None:
    scenario = cross_person(small_people, 0)
    tiny = _kept(scenario.sources[0], np.isin(np.arange(len(scenario.sources[0])), [0, 1]))
    with pytest.raises(DataError, match=f"{tiny.name}.* 0 validation windows of 2; both are needed"):
        _train(replace(scenario, sources=(tiny, *scenario.sources[1:])), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_person_is_named(small_people: Prepared) -> None:
    with pytest.raises(NotFoundError, match=r"no windows of subjects \['77'\]; known: 01, 02, 03, 04"):
        cross_person(small_people, ("01", "77"))


def test_a_run_that_diverges_says_so(small_people: Prepared, tmp_path: Path) -> None:
    wild = replace(_CONFIG, lr=1e30, optimiser="sgd")
    with pytest.raises(ConfigError, match=r"erm diverged before its first evaluation \(step 3\); lower"):
        _train(cross_person(small_people, 0), tmp_path, config=wild)
    assert not (tmp_path / "result.json").exists()
    assert [row["loss"] for row in _rows(tmp_path)] == [None, None]


def test_a_run_that_diverges_later_keeps_what_it_had(
    small_people: Prepared, tmp_path: Path, monkeypatch
) -> None:
    from wearfleet_cloud.training import single

    def advance(algorithm, state, *arguments, steps, **more):
        if steps.start >= 3:
            params = {name: p * float("nan") for name, p in state.params.items()}
            state = state._replace(params=params)
        return real(algorithm, state, *arguments, steps=steps, **more)

    real = single.advance
    monkeypatch.setattr(single, "advance", advance)
    result = _train(cross_person(small_people, 0), tmp_path)
    assert result.summary["selected_step"] == 3
    rows = _rows(tmp_path)
    assert (rows[1]["loss"], rows[1]["target_accuracy"], rows[1]["source_validation_accuracy"]) == (
        None,
        0.0,
        0.0,
    )
    assert result.target_accuracy == rows[0]["target_accuracy"]


def test_one_run_of_a_stack_that_diverges_leaves_the_others(small_people: Prepared, tmp_path: Path) -> None:
    scenario = cross_person(small_people, 0)
    spec = model_spec_for(small_people.dataset)
    config = replace(_CONFIG, optimiser="sgd")
    runs = [
        plan_run(scenario, "erm", spec, replace(config, lr=lr), tmp_path / name)
        for name, lr in (("sane", 1e-3), ("wild", 1e30), ("calm", 1e-4))
    ]
    with pytest.raises(ConfigError, match="diverged"):
        train_stacked(runs, tmp_path / "stack")
    assert [(run.folder / "result.json").exists() for run in runs] == [True, False, True]
