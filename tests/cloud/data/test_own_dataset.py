"""The example of docs/howto/own-dataset.md runs as printed."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner
from wearfleet_cloud.cli import data
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import prepare
from wearfleet_protos.errors import ConfigError, DataError

HOWTO = Path(__file__).resolve().parents[3] / "docs" / "howto" / "own-dataset.md"


@pytest.fixture
def gym(tmp_path: Path) -> Path:
    (code,) = re.findall(r"```python\n(.*?)```", HOWTO.read_text(), re.DOTALL)
    (tmp_path / "gym.py").write_text(code)
    folder = tmp_path / "measurements" / "gym"
    folder.mkdir(parents=True)
    for person in ("anna", "bert"):
        lines = ["ax,ay,az,gx,gy,gz,label"]
        lines += ["0,0,1,180,0,0,squat"] * 200 + ["0,0,1,0,0,0,"] * 30 + ["1,0,0,0,0,0,row"] * 200
        (folder / f"{person}_2026-03-01.csv").write_text("\n".join(lines))
    return tmp_path


def test_the_example_reads_canonical_units_and_labels(gym: Path) -> None:
    prepared = prepare(dataset_named(str(gym / "gym.py")), gym / "measurements", gym / "cache")
    assert prepared.subjects == ("anna", "bert")
    (recording,) = prepared.recordings_of("anna")
    np.testing.assert_allclose(recording.samples[0], [0, 0, 9.80665, np.pi, 0, 0], rtol=1e-6)
    assert np.bincount(recording.labels + 1).tolist() == [30, 200, 200]
    # 430 samples: starts 0, 50, 100 lie in squat, 250, 300 in row (label from 230)
    assert prepared.windows.start[prepared.windows.subject == "anna"].tolist() == [0, 50, 100, 250, 300]


def test_the_example_reads_the_same_from_an_archive(gym: Path) -> None:
    dataset = dataset_named(str(gym / "gym.py"))
    plain = prepare(dataset, gym / "measurements", gym / "cache")
    packed = gym / "packed"
    packed.mkdir()
    with zipfile.ZipFile(packed / "gym-2026.zip", "w") as archive:
        for file in sorted((gym / "measurements" / "gym").iterdir()):
            archive.write(file, f"gym/{file.name}")
    from_zip = prepare(dataset, packed, gym / "cache")
    np.testing.assert_array_equal(from_zip.windows.x, plain.windows.x)


def test_the_example_refuses_an_unknown_label(gym: Path) -> None:
    file = gym / "measurements" / "gym" / "anna_2026-03-01.csv"
    file.write_text(file.read_text().replace("row", "jump"))
    with pytest.raises(DataError, match="jump"):
        prepare(dataset_named(str(gym / "gym.py")), gym / "measurements", gym / "cache")


def test_the_printed_command_describes_it(gym: Path) -> None:
    app = typer.Typer()
    data.register(app)
    arguments = ["data", "describe", str(gym / "gym.py"), "--data-root", str(gym / "measurements"), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--cache-dir", str(gym / "cache")], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert report["counts"]["samples_by_label"] == {"-1": 60, "0": 400, "1": 400}
    assert report["prepared"]["person_groups"] == [["anna"], ["bert"]]


def test_a_file_without_a_description_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="DATASET"):
        dataset_named(str(tmp_path / "empty.py"))
    with pytest.raises(ConfigError, match="does not exist"):
        dataset_named(str(tmp_path / "missing.py"))
    with pytest.raises(ConfigError, match="known: dsads, dsads-ddlearn, emg"):
        dataset_named("hapd")
