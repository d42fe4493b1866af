"""Whole runs on a small simulated scenario."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from wearfleet_cloud.data.scenarios import Scenario, split_sources
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.model_files import load_model
from wearfleet_cloud.training.scoring import score
from wearfleet_cloud.training.settings import run_settings
from wearfleet_cloud.training.trainer import TrainResult, model_spec_for, train
from wearfleet_models import ModelSpec
from wearfleet_protos.errors import ConfigError, ConflictError, IntegrityError, ShapeError

_CONFIG = TrainConfig(steps=45, batch=8, evaluate_every=10, lr=3e-3, seed=4)


def _train(
    scenario: Scenario, out: Path, algorithm: str = "erm", config: TrainConfig = _CONFIG, **more
) -> TrainResult:
    return train(scenario, algorithm, model_spec_for(scenario.prepared.dataset), config, out, **more)


def _rows(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("algorithm", ["erm", "mixup", "coral"])
def test_a_run_learns_and_writes_what_it_did(
    small_scenario: Scenario, tmp_path: Path, algorithm: str
) -> None:
    result = _train(small_scenario, tmp_path, algorithm)
    summary = json.loads((tmp_path / "result.json").read_text())
    assert summary == json.loads(json.dumps(dict(result.summary)))
    assert summary["source_validation_accuracy"] > 0.5  # six activities
    assert (summary["algorithm"], summary["seed"], summary["selection"]) == (
        algorithm,
        4,
        "source-validation",
    )
    assert (summary["dataset"], summary["simulated"], summary["scenario"]) == (
        "simulator",
        True,
        "cross-person",
    )
    assert summary["hyper"]["lr"] == 3e-3
    assert summary["steps_per_second"] > 0
    assert summary["commit"]
    assert (
        sum(map(sum, summary["target_confusion"])) == summary["target_windows"] == len(small_scenario.target)
    )
    assert [row["step"] for row in _rows(tmp_path)] == [10, 20, 30, 40, 45]


@pytest.mark.parametrize(
    ("rule", "measure"),
    [
        ("source-validation", "source_validation_accuracy"),
        ("mixup-validation", "mixup_validation_accuracy"),
        ("oracle", "source_validation_accuracy"),
    ],
)
def test_the_kept_step_is_the_first_best_by_the_rule_that_was_asked_for(
    small_scenario: Scenario, tmp_path: Path, rule: str, measure: str
) -> None:
    result = _train(small_scenario, tmp_path, config=replace(_CONFIG, selection=rule))
    rows, summary = _rows(tmp_path), result.summary
    kept = max(rows, key=lambda row: row[measure])  # the first of the best
    assert (summary["selection"], summary["selected_step"]) == (rule, kept["step"])
    for name in ("source_validation_accuracy", "target_accuracy", "target_macro_f1"):
        assert summary[name] == kept[name]
    assert set(summary["selections"]) == {"source-validation", "mixup-validation", "oracle"}
    scores = {name: kept[name] for name in summary["selections"][rule] if name != "step"}
    assert summary["selections"][rule] == {"step": kept["step"], **scores}


def test_the_saved_model_takes_raw_windows_and_scores_the_same(
    small_scenario: Scenario, tmp_path: Path
) -> None:
    result = _train(small_scenario, tmp_path)
    target, labels = small_scenario.target, small_scenario.prepared.dataset.label_names
    assert score(load_model(tmp_path), target.x, target.y, labels).accuracy == result.target_accuracy


def test_standardisation_comes_from_training_windows_of_the_sources_only(
    small_scenario: Scenario, tmp_path: Path
) -> None:
    model = _train(small_scenario, tmp_path).model
    x = np.concatenate([domain.x for domain in split_sources(small_scenario, "block").train])
    np.testing.assert_allclose(model.standardise.mean.numpy(), x.mean((0, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.standardise.std.numpy(), x.std((0, 2)), rtol=1e-4)


def test_target_labels_do_not_change_the_model(small_scenario: Scenario, tmp_path: Path) -> None:
    other = replace(
        small_scenario, target=replace(small_scenario.target, y=np.zeros_like(small_scenario.target.y))
    )
    _train(small_scenario, tmp_path / "a")
    _train(other, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


class _PowerCutError(Exception):
    """The process is gone."""


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "stops"), [("mixup", [1]), ("mixup", [20]), ("coral", [13, 37, 45])])
def test_an_interrupted_run_goes_on_bit_by_bit(
    small_scenario: Scenario, tmp_path: Path, algorithm: str, stops: list[int]
) -> None:
    _train(small_scenario, tmp_path / "whole", algorithm)
    for stop in stops:

        def cut(_what: str, done: int, _total: int, stop: int = stop) -> None:
            if done == stop:
                raise _PowerCutError

        with pytest.raises(_PowerCutError):
            _train(small_scenario, tmp_path / "cut", algorithm, progress=cut)
    seen: list[int] = []
    _train(
        small_scenario, tmp_path / "cut", algorithm, progress=lambda _what, done, _total: seen.append(done)
    )
    assert seen[0] == (stops[-1] - 1) // 10 * 10 + 1
    assert _rows(tmp_path / "cut") == _rows(tmp_path / "whole")
    whole, cut_run = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut_run


def test_a_finished_run_is_not_trained_again(small_scenario: Scenario, tmp_path: Path) -> None:
    first = _train(small_scenario, tmp_path).summary
    steps: list[int] = []
    again = _train(small_scenario, tmp_path, progress=lambda _what, done, _total: steps.append(done)).summary
    assert (steps, again) == ([], first)


def test_rows_that_the_checkpoint_does_not_know_are_made_again(
    small_scenario: Scenario, tmp_path: Path
) -> None:
    _train(small_scenario, tmp_path)
    rows = _rows(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "loss": 1}\n{"step": 7')  # ahead of the checkpoint, and cut short
    _train(small_scenario, tmp_path)
    assert _rows(tmp_path) == rows


@pytest.mark.parametrize("change", [{"seed": 5}, {"steps": 50}, {"hyper": {"alpha": 0.3}}])
def test_a_folder_with_another_run_is_refused_and_left_alone(
    small_scenario: Scenario, tmp_path: Path, change: dict
) -> None:
    _train(small_scenario, tmp_path, "mixup")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConflictError, match="choose another folder"):
        _train(small_scenario, tmp_path, "mixup", replace(_CONFIG, **change))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_checkpoint_is_refused(small_scenario: Scenario, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"junk")
    with pytest.raises(IntegrityError, match="delete it"):
        _train(small_scenario, tmp_path)


def test_a_seed_changes_the_run(small_scenario: Scenario, tmp_path: Path) -> None:
    _train(small_scenario, tmp_path / "a")
    _train(small_scenario, tmp_path / "b", config=replace(_CONFIG, seed=5))
    assert _rows(tmp_path / "a") != _rows(tmp_path / "b")


def test_wrong_requests_are_refused_before_anything_is_written(
    small_scenario: Scenario, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ShapeError, match="use model_spec_for"):
        train(small_scenario, "erm", ModelSpec("cnn", 3, 128, 6), _CONFIG, out)
    with pytest.raises(ConfigError, match="unknown algorithm"):
        _train(small_scenario, out, "ermm")
    with pytest.raises(ConfigError, match="mixup has no hyper-parameter 'gamma'; it has: alpha"):
        _train(small_scenario, out, "mixup", replace(_CONFIG, hyper={"gamma": 1.0}))
    with pytest.raises(ConfigError, match="use --device cpu"):
        _train(small_scenario, out, config=replace(_CONFIG, device="nonsense"))
    assert not out.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"seed": -1},
        {"optimiser": "lbfgs"},
        {"selection": "last"},
        {"standardise": "minmax"},
        {"momentum": 1.0, "optimiser": "sgd"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        TrainConfig(**wrong)


def test_settings_reach_the_part_they_belong_to(small_scenario: Scenario) -> None:
    dataset = small_scenario.prepared.dataset
    settings = [
        "neck=bottleneck",
        "standardise=none",
        "lr=0.5",
        "kernel=5",
        "alpha=2",
        "pairing=domain",
        "betas=0.5,0.9",
        "lr=0.25",
    ]
    spec, config = run_settings(dataset, "mixup", _CONFIG, "cnn", settings)
    assert (spec.kernel, config.lr, config.betas, config.steps) == (5, 0.25, (0.5, 0.9), 45)
    assert (spec.neck, config.standardise) == ("bottleneck", "none")
    assert (dict(config.hyper), dict(config.options)) == ({"alpha": 2.0}, {"pairing": "domain"})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "name=value"),
        ("gamma=1", "unknown setting 'gamma'; known for erm: batch"),
        ("lr=fast", "lr=fast"),
        ("betas=1", "betas=1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    small_scenario: Scenario, setting: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_settings(small_scenario.prepared.dataset, "erm", _CONFIG, "cnn", [setting])


def test_unscaled_windows_make_another_run_whose_model_says_so(
    small_scenario: Scenario, tmp_path: Path
) -> None:
    scaled = _train(small_scenario, tmp_path / "scaled")
    raw = _train(small_scenario, tmp_path / "raw", config=replace(_CONFIG, standardise="none"))
    assert [run.summary["standardise"] for run in (scaled, raw)] == ["zscore", "none"]
    assert _rows(tmp_path / "raw") != _rows(tmp_path / "scaled")
    kept = load_model(tmp_path / "raw").standardise
    assert bool((kept.mean == 0).all())
    assert bool((kept.std == 1).all())
    assert bool((scaled.model.standardise.std != 1).all())


def test_a_baseline_can_be_given_a_bottleneck(small_scenario: Scenario, tmp_path: Path) -> None:
    spec = replace(model_spec_for(small_scenario.prepared.dataset), neck="bottleneck", neck_width=7)
    result = train(small_scenario, "erm", spec, replace(_CONFIG, steps=5), tmp_path)
    assert result.model.head.in_features == 7
    assert load_model(tmp_path).spec == result.model.spec == spec


def test_an_algorithm_with_a_neck_of_its_own_refuses_another(
    small_scenario: Scenario, tmp_path: Path
) -> None:
    spec = replace(model_spec_for(small_scenario.prepared.dataset), neck="dense")
    with pytest.raises(ConfigError, match="fixed works on a bottleneck"):
        train(small_scenario, "fixed", spec, _CONFIG, tmp_path)


def test_usc_had_has_its_own_kernel() -> None:
    from wearfleet_cloud.data import dataset_named

    assert model_spec_for(dataset_named("usc-had")).kernel == 6
    assert model_spec_for(dataset_named("hapt"), "transformer").kernel == 9


def test_training_leaves_the_global_generator_of_torch_alone(
    small_scenario: Scenario, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    _train(small_scenario, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_transductive_run_is_scored_by_what_the_algorithm_found_and_keeps_the_network(
    small_scenario: Scenario, tmp_path: Path
) -> None:
    erm = _train(small_scenario, tmp_path / "erm").summary
    config = replace(_CONFIG, hyper={"clusters": 12.0})
    result = _train(small_scenario, tmp_path / "sot", "sot", config)
    sot, rows = result.summary, _rows(tmp_path / "sot")
    assert (erm["transductive"], sot["transductive"]) == (False, True)
    assert sot["network_target_accuracy"] == erm["network_target_accuracy"] == erm["target_accuracy"]
    assert sot["source_validation_accuracy"] == erm["source_validation_accuracy"]
    assert sot["target_accuracy"] != erm["target_accuracy"]
    confusion = np.array(sot["target_confusion"])
    assert confusion.sum() == len(small_scenario.target)
    assert sot["target_accuracy"] == confusion.trace() / confusion.sum()
    kept = sot["selections"]["source-validation"]
    assert kept["target_accuracy"] == sot["target_accuracy"]
    assert {row["target_accuracy"] for row in rows} == {
        sot["target_accuracy"]
    }  # fixed statistics, no network
    assert result.model.spec == load_model(tmp_path / "erm").spec
