"""The commands train, evaluate and algorithms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result
from wearfleet_cloud.algorithms import ALGORITHMS
from wearfleet_cloud.cli import train as commands
from wearfleet_models import BACKBONES
from wearfleet_protos.errors import ConfigError, NotFoundError

_USER_DATA = """
from dataclasses import replace

from wearfleet_cloud.data.simulator import Simulation, simulated_dataset

DATASET = replace(simulated_dataset(Simulation(persons=3, sessions=1, bouts=2, bout_s=16.0)), group_size=1)
"""


@pytest.fixture
def run(tmp_path: Path):
    (tmp_path / "small.py").write_text(_USER_DATA)
    app = typer.Typer(pretty_exceptions_enable=False)
    commands.register(app)
    common = ["--dataset", str(tmp_path / "small.py"), "--cache-dir", str(tmp_path / "cache")]

    def call(command: str, *arguments: str) -> Result:
        options = [] if command == "algorithms" else common
        return CliRunner().invoke(app, [command, *options, *arguments])

    return call


_SHORT = ["--steps", "20", "--set", "batch=8", "--set", "evaluate_every=10", "--set", "lr=0.003"]


def test_train_then_evaluate_report_the_same_accuracy(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained = run("train", "--target", "1", "--algorithm", "coral", "--out", str(out), *_SHORT, "--json")
    assert trained.exit_code == 0, trained.output
    summary = json.loads(trained.stdout)
    assert summary["algorithm"] == "coral"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.safetensors",
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
        "result.json",
    ]
    for where in (["--run", str(out)], ["--model", str(out / "model.safetensors")]):
        evaluated = json.loads(run("evaluate", "--target", "1", *where, "--json").stdout)
        assert evaluated["accuracy"] == summary["target_accuracy"]
        assert evaluated["simulated"] is True


def test_a_target_is_a_group_by_number_or_persons_by_name(run, tmp_path: Path) -> None:
    targets = {}
    for target in ("1", "02", "02,", "02,03"):
        trained = run("train", "--target", target, "--out", str(tmp_path / target), *_SHORT, "--json")
        assert trained.exit_code == 0, trained.output
        targets[target] = json.loads(trained.stdout)["target"]
    assert targets["1"] == targets["02"] == targets["02,"] == "persons 02"
    assert targets["02,03"] == "persons 02+03"


def test_tables_say_that_the_data_are_simulated(run, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    trained = run("train", "--out", out, *_SHORT)
    assert trained.exit_code == 0, trained.output
    assert "simulated" in trained.stdout
    assert "target accuracy" in trained.stdout
    assert "simulated" in run("evaluate", "--run", out).stdout


def test_algorithms_are_listed_with_paper_and_needs(run) -> None:
    listed = json.loads(run("algorithms", "--json").stdout)
    assert [entry["name"] for entry in listed] == list(ALGORITHMS)
    assert {entry["name"]: entry["needs"] for entry in listed}["coral"] == ["domain labels"]
    assert all(entry["paper"] and entry["family"] and entry["inference"] for entry in listed)
    assert "arXiv" in run("algorithms").stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["train", "--scenario", "cross-planet", "--out", "o"], ConfigError),
        (["train", "--set", "speed=9", "--out", "o"], ConfigError),
        (["train", "--backbone", "mamba", "--out", "o"], ConfigError),
        (["train", "--target", "nobody", "--out", "o"], NotFoundError),
        (["evaluate"], ConfigError),
        (["evaluate", "--run", "nowhere"], NotFoundError),
    ],
)
def test_wrong_requests_end_in_the_error_that_carries_the_exit_code(
    run, arguments: list[str], error: type
) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, error), result.output
    assert not Path("o").exists()


def test_help_does_not_load_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, typer; from wearfleet_cloud.cli import train; app = typer.Typer(); train.register(app);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_names_every_backbone() -> None:
    assert set(commands.BACKBONE_NAMES) == set(BACKBONES)
