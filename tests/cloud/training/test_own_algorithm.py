"""The examples of docs/howto/own-algorithm.md run as printed, and the functions for scripts do what the commands do."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from wearfleet_cloud import evaluate, load_dataset, train
from wearfleet_cloud.algorithms import algorithm_info
from wearfleet_cloud.cli import benchmark
from wearfleet_cloud.cli import train as training
from wearfleet_cloud.data.simulator import Simulation, simulated_dataset
from wearfleet_protos.errors import ConfigError, NotFoundError

_HOWTO = Path(__file__).resolve().parents[3] / "docs" / "howto" / "own-algorithm.md"
_BLOCKS = re.findall(r"```(\w+)\n(.*?)```", _HOWTO.read_text(), re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example's file, a home of its own, and shorter runs on fewer people."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sharp.py").write_text(_BLOCKS[0][1])
    return tmp_path


def _commands() -> list[list[str]]:
    (text,) = [code for language, code in _BLOCKS if language == "sh"]
    lines = text.replace("--steps 100", "--steps 6 --set batch=4").splitlines()
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("command", _commands(), ids=lambda words: words[0])
def test_the_printed_commands_run(here: Path, command: list[str]) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    training.register(app)
    benchmark.register(app)
    result = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    if command[0] == "train":
        summary = json.loads((here / "runs/sharp/result.json").read_text())
        assert (summary["algorithm"], summary["hyper"]["sharpness"]) == ("sharp", 4.0)
    else:
        table = (here / "runs/compared/table-source-validation.md").read_text()
        assert "| sharp.py |" in table
        assert json.loads(result.stdout)["failed"] == 0


@pytest.mark.slow
def test_the_printed_script_runs(here: Path) -> None:
    code = _BLOCKS[-1][1].replace("steps=100", "steps=6")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=here, timeout=100
    )
    assert done.returncode == 0, done.stderr
    accuracy, f1 = map(float, done.stdout.split())
    assert accuracy == json.loads((here / "runs/from-python/result.json").read_text())["target_accuracy"]
    assert 0.0 <= f1 <= 1.0


def test_functions_take_what_the_commands_take(tmp_path: Path) -> None:
    dataset = simulated_dataset(Simulation(persons=3, sessions=1, bouts=2, bout_s=16.0))
    people = load_dataset(dataset, cache_dir=tmp_path / "cache")
    options = {"target": ("02",), "steps": 6, "batch": 4, "betas": (0.5, 0.9), "pairing": "domain"}
    run = train(people, "mixup", out=tmp_path / "run", **options)
    config = run.summary["config"]
    assert (config["betas"], config["options"]) == ((0.5, 0.9), {"pairing": "domain"})
    assert run.summary["target"] == "persons 02"
    for model in (run, run.model, run.folder, str(run.folder)):
        assert evaluate(model, people, target="02").accuracy == run.target_accuracy
    with pytest.raises(ConfigError, match="unknown setting 'speed'"):
        train(people, "erm", target="02", out=tmp_path / "other", speed=9)
    with pytest.raises(NotFoundError):
        evaluate(tmp_path / "nowhere", people)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, wearfleet_cloud; assert not {'torch', 'numpy', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError):
        from wearfleet_cloud import nothing_of_the_kind  # noqa: F401


@pytest.mark.parametrize("text", ["", "ALGORITHM = 3", "ALGORITHM = int"])
def test_a_file_without_an_algorithm_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.py").write_text(text)
    with pytest.raises(ConfigError, match="ALGORITHM that holds a class of Algorithm"):
        algorithm_info(str(tmp_path / "empty.py"))
    with pytest.raises(ConfigError, match="does not exist"):
        algorithm_info(str(tmp_path / "missing.py"))
