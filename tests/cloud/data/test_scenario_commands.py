"""A scenario named on the command line is trained on, scored on, and found again by whoever reads the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import typer
from typer.testing import CliRunner
from wearfleet_cloud.cli import train as commands
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import prepare
from wearfleet_cloud.data.scenarios import open_scenario, split_sources
from wearfleet_cloud.export.run_folder import read_run, windows_of_run

SMALL = """
from dataclasses import replace

from wearfleet_cloud.data.sliced import ChannelGroup, SlicedReader
from wearfleet_cloud.data.simulator import Simulation, simulated_dataset

WHOLE = simulated_dataset(Simulation(persons=3, sessions=1, bouts=2, bout_s=16.0))
AXES = WHOLE.channels[:3]
PARTS = (ChannelGroup("first", (0, 1, 2)), ChannelGroup("second", (3, 4, 5)))
READER = SlicedReader(WHOLE.reader, AXES, PARTS, "position")
DATASET = replace(WHOLE, views={"cross-position": replace(WHOLE, channels=AXES, reader=READER)})
"""


def test_train_evaluate_and_export_know_the_scenario(tmp_path: Path) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    commands.register(app)
    (tmp_path / "small.py").write_text(SMALL)
    data = ["--dataset", str(tmp_path / "small.py"), "--cache-dir", str(tmp_path / "cache")]
    scenario = ["--scenario", "cross-position", "--target", "second"]
    out = str(tmp_path / "run")
    short = ["--steps", "4", "--set", "batch=8", "--set", "evaluate_every=4", "--json"]
    trained = CliRunner().invoke(
        app, ["train", *data, *scenario, "--out", out, *short], catch_exceptions=False
    )
    summary = json.loads(trained.stdout)
    assert (summary["scenario"], summary["target"], summary["source_domains"]) == (
        "cross-position",
        "second",
        ["first"],
    )
    assert summary["model"]["channels"] == 3
    scored = CliRunner().invoke(
        app, ["evaluate", *data, *scenario, "--run", out, "--json"], catch_exceptions=False
    )
    assert json.loads(scored.stdout)["accuracy"] == summary["target_accuracy"]

    dataset = dataset_named(str(tmp_path / "small.py"))
    run = read_run(Path(out))
    windows = windows_of_run(run, prepare(dataset.for_scenario(run.scenario), None, tmp_path / "cache"))
    opened = open_scenario(dataset, run.scenario, 1, seed=0, data_root=None, cache_dir=tmp_path / "cache")
    split = split_sources(opened)
    np.testing.assert_array_equal(windows.x, split.train[0].x)
    np.testing.assert_array_equal(windows.y_validation, split.validation[0].y)
