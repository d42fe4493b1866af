"""An activity left out of training is unknown to the run, to its export, and to the table of its scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner
from wearfleet_cloud.cli import export
from wearfleet_cloud.cli import train as commands
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import prepare
from wearfleet_cloud.data.scenarios import build_scenario
from wearfleet_cloud.export.detection import unknown_windows
from wearfleet_cloud.export.ood_score import OOD_METHODS
from wearfleet_cloud.export.run_folder import read_run
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.manifest import ModelManifest

pytestmark = pytest.mark.slow


def invoke(cache: Path, *arguments: object):
    app = typer.Typer(pretty_exceptions_enable=False)
    commands.register(app)
    export.register(app)
    given = [*map(str, arguments), "--cache-dir", str(cache)]
    return CliRunner().invoke(app, given, catch_exceptions=False)


def test_a_left_out_activity_is_unknown_everywhere(tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "run"
    prepared = prepare(dataset_named("simulator"), None, cache)
    names = prepared.dataset.label_names
    arguments = [
        "--dataset",
        "simulator",
        "--leave-out",
        names[0],
        "--steps",
        40,
        "--set",
        "evaluate_every=40",
    ]
    summary = json.loads(invoke(cache, "train", *arguments, "--out", out, "--json").stdout)
    assert summary["labels"] == list(names[1:])

    found = json.loads(
        invoke(cache, "evaluate", "--dataset", "simulator", "--run", out, "--ood", "--json").stdout
    )
    assert list(found) == ["unseen person", "unseen activity"]
    assert all(tuple(scores) == OOD_METHODS for scores in found.values())
    table = invoke(cache, "evaluate", "--dataset", "simulator", "--run", out, "--ood").stdout
    assert "unseen activity" in table

    target = build_scenario("cross-person", prepared, 0).target
    person, activity = unknown_windows(read_run(out), prepared)
    np.testing.assert_array_equal(activity.outside, target.x[target.y == 0])
    np.testing.assert_array_equal(activity.inside, target.x[target.y != 0])
    np.testing.assert_array_equal(person.outside, activity.inside)

    options = ["--run", out, "--out", tmp_path / "m.onnx", "--ood-method", "cosine", "--json"]
    invoke(cache, "export", *options)
    manifest = ModelManifest.from_bytes((tmp_path / "m.manifest.json").read_bytes())
    assert (manifest.contract.labels, manifest.ood_method) == (names[1:], "cosine")


def test_what_the_score_table_needs_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--ood needs --run"):
        invoke(tmp_path, "evaluate", "--dataset", "simulator", "--model", "m.safetensors", "--ood")
