"""Runs that advance together come to what single runs come to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from no_reading import NoReading
from wearfleet_cloud.algorithms import ALGORITHMS, Algorithm
from wearfleet_cloud.data.prepared import Prepared
from wearfleet_cloud.data.scenarios import cross_person
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.model_files import load_model
from wearfleet_cloud.training.run import Run, plan_run
from wearfleet_cloud.training.stacked import stack_key, stacked_runs, train_stacked
from wearfleet_cloud.training.trainer import model_spec_for, train
from wearfleet_protos.errors import ConfigError, ConflictError

# Without Adam: it blows up the rounding of gradients that are zero, those of a bias before a normalisation.
_CONFIG = TrainConfig(steps=25, batch=8, evaluate_every=10, lr=1e-3, optimiser="sgd")


def _runs(data: Prepared, out: Path, algorithm: str = "erm", backbone: str = "cnn") -> list[Run]:
    """Three runs that differ in target, seed, learning rate and kept rule."""
    spec = replace(model_spec_for(data.dataset, backbone), feedforward=16)
    configs = [
        replace(_CONFIG, seed=1),
        replace(_CONFIG, seed=2, lr=2e-3),
        replace(_CONFIG, seed=1, selection="mixup-validation"),
    ]
    return [
        plan_run(cross_person(data, target, config.seed), algorithm, spec, config, out / str(number))
        for number, (target, config) in enumerate(zip((0, 1, 2), configs, strict=True))
    ]


def _rows(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "backbone"), [("erm", "cnn"), ("mixup", "cnn"), ("coral", "cnn"), ("erm", "transformer")]
)
def test_stacked_runs_equal_single_runs(
    small_people: Prepared, tmp_path: Path, algorithm: str, backbone: str
) -> None:
    runs = _runs(small_people, tmp_path / "stacked", algorithm, backbone)
    together = train_stacked(runs, tmp_path / "checkpoint")
    for run, stacked in zip(runs, together, strict=True):
        alone = tmp_path / "alone" / run.folder.name
        single = train(run.scenario, algorithm, run.spec, run.config, alone)
        for mine, expected in zip(_rows(run.folder), _rows(alone), strict=True):
            assert mine.keys() == expected.keys()
            # Sums in another order, about 1e-7 a step. A window near a tie may fall to the other side.
            assert mine == pytest.approx(expected, rel=1e-3, abs=0.02)
        assert stacked.summary.keys() == single.summary.keys()
        for name in ("target", "split_hash", "hyper", "seed", "selection", "train_windows", "model"):
            assert stacked.summary[name] == single.summary[name], name
        if stacked.summary["selected_step"] == single.summary["selected_step"]:
            weights, others = (load_model(folder).state_dict() for folder in (run.folder, alone))
            # A ReLU or a pool near a tie may pick the other side. That moved no weight by more than 7e-5 here,
            # while 25 steps move them by 1e-2 and other weights start 1e-1 apart.
            torch.testing.assert_close(weights, others, rtol=1e-3, atol=1e-3)
        assert sorted(p.name for p in run.folder.iterdir() if "checkpoint" not in p.name) == sorted(
            p.name for p in alone.iterdir() if "checkpoint" not in p.name
        )


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [name for name, kind in ALGORITHMS.items() if not kind.info.alone])
def test_every_algorithm_that_stacks_comes_to_its_single_runs(
    small_people: Prepared, tmp_path: Path, algorithm: str
) -> None:
    """Two seeds; windows are looked at as a whole (``refresh``) and passes end within the ten steps."""
    spec = replace(model_spec_for(small_people.dataset), feedforward=16)
    config = replace(_CONFIG, steps=10, evaluate_every=5, lr=1e-4)
    hyper = dict.fromkeys(("teacher_steps", "linear_steps", "anneal_steps"), 2.0)
    hyper = {name: value for name, value in hyper.items() if name in ALGORITHMS[algorithm].info.hyper}
    scenario = cross_person(small_people, 0)
    runs = [
        plan_run(scenario, algorithm, spec, replace(config, seed=seed, hyper=hyper), tmp_path / str(seed))
        for seed in (1, 2)
    ]
    train_stacked(runs, tmp_path / "checkpoint")
    for run in runs:
        alone = tmp_path / "alone" / run.folder.name
        train(scenario, algorithm, spec, run.config, alone)
        for mine, expected in zip(_rows(run.folder), _rows(alone), strict=True):
            assert mine == pytest.approx(expected, rel=5e-3, abs=0.03)


class _PowerCutError(Exception):
    """The process is gone."""


@pytest.mark.slow
def test_an_interrupted_stack_goes_on_bit_by_bit(small_people: Prepared, tmp_path: Path) -> None:
    def cut(_what: str, done: int, _total: int) -> None:
        if done == 17:
            raise _PowerCutError

    whole, broken = _runs(small_people, tmp_path / "whole"), _runs(small_people, tmp_path / "broken")
    train_stacked(whole, tmp_path)
    with pytest.raises(_PowerCutError):
        train_stacked(broken, tmp_path / "broken", cut)
    seen: list[int] = []
    train_stacked(broken, tmp_path / "broken", lambda _what, done, _total: seen.append(done))
    assert seen[0] == 11
    for one, other in zip(whole, broken, strict=True):
        assert _rows(one.folder) == _rows(other.folder)
        bytes_of = [(run.folder / "model.safetensors").read_bytes() for run in (one, other)]
        assert bytes_of[0] == bytes_of[1]


def test_a_folder_with_another_stack_is_refused(small_people: Prepared, tmp_path: Path) -> None:
    runs = _runs(small_people, tmp_path)
    train_stacked(runs, tmp_path / "checkpoint")
    with pytest.raises(ConflictError, match="choose another folder"):
        train_stacked(runs[:2], tmp_path / "checkpoint")


def test_what_must_be_equal_is_in_the_key_and_what_may_differ_is_not(
    small_people: Prepared, tmp_path: Path
) -> None:
    runs = _runs(small_people, tmp_path)
    assert len({stack_key(run) for run in runs}) == 1
    others = [
        replace(runs[0], algorithm="coral"),
        replace(runs[0], config=replace(_CONFIG, batch=4)),
        replace(runs[0], config=replace(_CONFIG, weight_decay=0.0)),
        replace(runs[0], spec=replace(runs[0].spec, kernel=5)),
        plan_run(
            cross_person(small_people, small_people.subjects[:2]),
            "erm",
            runs[0].spec,
            _CONFIG,
            tmp_path,
        ),
    ]
    assert len({stack_key(run) for run in [runs[0], *others]}) == 6
    with pytest.raises(ConfigError, match="2 different ones"):
        train_stacked([runs[0], others[0]], tmp_path)


def test_what_looks_at_the_target_runs_alone() -> None:
    for name, kind in ALGORITHMS.items():
        assert kind.transduce is Algorithm.transduce or kind.info.alone, name


@pytest.mark.slow
def test_replayed_steps_are_the_steps(small_people: Prepared, tmp_path: Path) -> None:
    """The buffers of a recording on a CPU, where replaying is running the same work again on them."""
    for algorithm in ("mixup", "diversify"):  # one kind of step, and three that take turns
        runs = [
            replace(run, config=replace(run.config, steps=40))
            for run in _runs(small_people, tmp_path, algorithm)
        ]
        plain = stacked_runs(runs[:1])
        recorded = stacked_runs(runs[:1], recorder=lambda work: work)
        expected, before = plain.init(), recorded.init()
        for steps in (range(9), range(9, 10), range(10, 40)):
            expected, means = plain.make_steps(expected, steps, lambda _: None)
            after, found = recorded.make_steps(before, steps, lambda _: None)
            torch.testing.assert_close(tuple(after), tuple(expected), rtol=0.0, atol=0.0)
            torch.testing.assert_close(found, means, rtol=0.0, atol=0.0)
            before = after
        assert len(recorded.recorded) == (1 if algorithm == "mixup" else 3)


def test_a_step_that_cannot_be_recorded_runs_as_it_is(
    small_people: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_work: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    runs = _runs(small_people, tmp_path)[:1]
    plain, recorded = stacked_runs(runs), stacked_runs(runs, recorder=fails)
    expected, _ = plain.make_steps(plain.init(), range(3), lambda _: None)
    found, _ = recorded.make_steps(recorded.init(), range(3), lambda _: None)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=0.0, atol=0.0)
    assert "without a recording" in caplog.text


def test_no_stacked_step_reads_a_value_back(small_people: Prepared, tmp_path: Path) -> None:
    stack = stacked_runs(_runs(small_people, tmp_path)[:2])
    state = stack.init()
    with NoReading():
        stack.make_steps(state, range(2), lambda _: None)
