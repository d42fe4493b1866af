"""Stacked runs on a CUDA device: a recorded graph gives what the steps give, and what single runs on a CPU give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from wearfleet_cloud.algorithms import ALGORITHMS
from wearfleet_cloud.data.prepared import Prepared, prepare
from wearfleet_cloud.data.scenarios import cross_person
from wearfleet_cloud.data.simulator import Simulation, simulated_dataset
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.run import Run, plan_run
from wearfleet_cloud.training.stacked import stacked_runs, train_stacked
from wearfleet_cloud.training.trainer import model_spec_for, train

pytestmark = pytest.mark.gpu

_STACKING = [name for name, kind in ALGORITHMS.items() if not kind.info.alone]
_CONFIG = TrainConfig(steps=12, batch=8, evaluate_every=6, lr=1e-4, optimiser="sgd", device="cuda")


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full float32 products, so that CPU and GPU differ only in the order of sums."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    simulated = simulated_dataset(Simulation(persons=4, sessions=1, bouts=2, bout_s=16.0))
    return prepare(replace(simulated, group_size=1), None, tmp_path_factory.mktemp("people"))


def _runs(people: Prepared, out: Path, algorithm: str) -> list[Run]:
    spec = replace(model_spec_for(people.dataset), feedforward=16)
    scenario = cross_person(people, 0)
    return [
        plan_run(scenario, algorithm, spec, replace(_CONFIG, seed=seed), out / str(seed)) for seed in (1, 2)
    ]


@pytest.mark.parametrize("algorithm", _STACKING)
def test_a_recorded_step_is_the_step(people: Prepared, tmp_path: Path, algorithm: str) -> None:
    runs = _runs(people, tmp_path, algorithm)
    recorded = stacked_runs(runs)
    plain = replace(recorded, recorder=None)
    expected, means = plain.make_steps(plain.init(), range(6), lambda _: None)
    found, same = recorded.make_steps(recorded.init(), range(6), lambda _: None)
    for mine, theirs in zip(found, expected, strict=True):
        # atomic sums of some backward kernels have no fixed order
        torch.testing.assert_close(dict(mine), dict(theirs), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(same, means, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["erm", "coral", "mmd"])
def test_the_recording_takes_place_for_what_a_benchmark_runs_most(
    people: Prepared, tmp_path: Path, algorithm: str
) -> None:
    stack = stacked_runs(_runs(people, tmp_path, algorithm))
    stack.make_steps(stack.init(), range(2), lambda _: None)
    (step,) = stack.recorded.values()
    assert step.recorded


@pytest.mark.parametrize("algorithm", ["erm", "coral", "mixup"])
def test_a_stack_on_the_gpu_comes_to_single_runs_on_the_cpu(
    people: Prepared, tmp_path: Path, algorithm: str
) -> None:
    runs = _runs(people, tmp_path, algorithm)
    for run, stacked in zip(runs, train_stacked(runs, tmp_path / "stack"), strict=True):
        config = replace(run.config, device="cpu")
        alone = train(run.scenario, algorithm, run.spec, config, tmp_path / "alone" / run.folder.name)
        assert stacked.target_accuracy == pytest.approx(alone.target_accuracy, abs=0.03)
        weights, others = stacked.model.cpu().state_dict(), alone.model.state_dict()
        torch.testing.assert_close(weights, others, rtol=1e-2, atol=1e-3)


def test_no_stacked_step_waits_for_the_host(people: Prepared, tmp_path: Path) -> None:
    stack = stacked_runs(_runs(people, tmp_path, "erm"))
    state, _ = stack.make_steps(
        stack.init(), range(1), lambda _: None
    )  # libraries start up, the step is recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        stack.make_steps(state, range(1, 12), lambda _: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
