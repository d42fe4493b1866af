"""What docs/howto/run-a-benchmark.md says is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from wearfleet_cloud.cli import benchmark
from wearfleet_cloud.training.selection import RULES

_HOWTO = (Path(__file__).resolve().parents[4] / "docs" / "howto" / "run-a-benchmark.md").read_text()


@pytest.mark.slow
def test_the_printed_command_runs_on_simulated_people(tmp_path: Path, people: str, cache: Path) -> None:
    (command,) = re.findall(r"```sh\n(.*?)```", _HOWTO, re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))[1:]
    smaller = {
        "--datasets": people,
        "--data-root": str(tmp_path),
        "--steps": "4",
        "--seeds": "0,1",
        "--out": str(tmp_path / "out"),
    }
    for option, value in smaller.items():
        words[words.index(option) + 1] = value
    app = typer.Typer(pretty_exceptions_enable=False)
    benchmark.register(app)
    extra = ["--cache-dir", str(cache), "--set", "batch=4"]
    result = CliRunner().invoke(app, [*words[1:], *extra], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "12 runs, 0 failed" in result.stdout
    assert "people.py (simulated), cross-person, cnn" in result.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    for rule in RULES:
        assert {f"table-{rule}.md", f"ranks-{rule}.png", f"critical-difference-{rule}.png"} <= names
    assert sum(name.startswith(("confusion-", "features-")) for name in names) == 4


def test_options_and_rules_of_the_text_exist() -> None:
    app = typer.Typer()
    benchmark.register(app)
    command = typer.main.get_command(app)  # with one command only, the command itself
    known = {option for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"`(--[a-z]+)", _HOWTO)) - {"--set"}
    assert named <= known
    assert set(re.findall(r"^  \| `([a-z-]+)` \|", _HOWTO, re.MULTILINE)) == set(RULES)
