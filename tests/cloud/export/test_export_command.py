"""The command ``export`` on a real run folder, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from wearfleet_cloud.cli import export
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import prepare
from wearfleet_cloud.data.scenarios import cross_person
from wearfleet_cloud.export.run_folder import read_run, windows_of_run
from wearfleet_cloud.fleet.model_contract import check_model
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.trainer import model_spec_for, train
from wearfleet_protos.errors import DataError, IntegrityError, NotFoundError
from wearfleet_protos.manifest import ModelManifest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache) -> Path:
    """A short run on simulated people."""
    folder = tmp_path_factory.mktemp("run")
    dataset = dataset_named("simulator")
    scenario = cross_person(prepare(dataset, None, cache), 0, seed=4)
    train(scenario, "erm", model_spec_for(dataset), TrainConfig(steps=40, seed=4, evaluate_every=40), folder)
    return folder


def invoke(*arguments: object) -> tuple[int, str, BaseException | None]:
    app = typer.Typer()
    export.register(app)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.exception


def test_run_becomes_checked_files_and_one_json_document(run, cache, tmp_path):
    out = tmp_path / "model.onnx"
    options = (
        "--run",
        run,
        "--out",
        out,
        "--cache-dir",
        cache,
        "--quantize",
        "int8",
        "--budget",
        0.5,
        "--json",
    )
    code, text, error = invoke(*options, "--model-id", "gait", "--model-version", 7)
    assert (code, error) == (0, None)
    report = json.loads(text)
    assert report["parity"]["argmax_agreement"] == 1.0
    assert (report["simulated"], report["transductive"]) == (True, False)
    manifest = ModelManifest.from_bytes(Path(report["manifest"]).read_bytes())
    check_model(out.read_bytes(), manifest)
    assert (manifest.model_id, manifest.version, manifest.train_run) == ("gait", 7, read_run(run).identity)
    small = ModelManifest.from_bytes(Path(report["int8"]["manifest"]).read_bytes())
    check_model((tmp_path / "model.int8.onnx").read_bytes(), small)
    assert small.model_id == "gait-int8"


@pytest.mark.parametrize("standardise", ["none", "min-max"])
def test_export_agrees_with_torch_however_windows_were_standardised(cache, tmp_path, standardise):
    dataset = dataset_named("simulator")
    scenario = cross_person(prepare(dataset, None, cache), 0, seed=4)
    config = TrainConfig(steps=4, seed=4, evaluate_every=4, standardise=standardise)
    train(scenario, "erm", model_spec_for(dataset), config, tmp_path / "run")
    out = tmp_path / "model.onnx"
    code, text, error = invoke(
        "--run", tmp_path / "run", "--out", out, "--cache-dir", cache, "--model-id", "gait", "--json"
    )
    assert (code, error) == (0, None)
    parity = json.loads(text)["parity"]
    assert parity["argmax_agreement"] == 1.0
    assert all(output["max_abs_difference"] <= output["tolerance"] for output in parity["outputs"])


def test_report_for_people_names_the_parity_and_that_people_were_simulated(run, cache, tmp_path):
    code, text, _ = invoke(
        "--run", run, "--out", tmp_path / "model.onnx", "--cache-dir", cache, "--ood-method", "energy"
    )
    assert code == 0
    assert "100.00%" in text
    assert "simulated" in text
    assert "energy" in text
    assert "transductive" not in text


def test_export_of_a_transductive_run_says_that_only_the_network_is_exported(run, cache, tmp_path):
    copied = copy_of(run, tmp_path, {"transductive": True})
    out = ("--out", tmp_path / "model.onnx", "--cache-dir", cache, "--ood-method", "energy")
    assert "the network that was trained" in invoke("--run", copied, *out)[1]
    assert json.loads(invoke("--run", copied, *out, "--json")[1])["transductive"] is True


def test_windows_of_a_run_are_those_it_was_trained_on(run, cache):
    trained = read_run(run)
    windows = windows_of_run(trained, prepare(dataset_named("simulator"), None, cache))
    assert (len(windows.y), len(windows.y_validation)) == trained.counts


def test_folder_without_a_run_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match=r"result\.json does not exist"):
        read_run(tmp_path)


def copy_of(run: Path, folder: Path, change: dict[str, object]) -> Path:
    for name in ("model.json", "model.safetensors"):
        (folder / name).write_bytes((run / name).read_bytes())
    result = json.loads((run / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | change))
    return folder


def test_damaged_result_is_refused(run, tmp_path):
    with pytest.raises(IntegrityError, match="not the result of a training run"):
        read_run(copy_of(run, tmp_path, {"target_subjects": 5}))


def test_other_data_than_that_of_the_run_is_refused(run, cache, tmp_path):
    other = read_run(copy_of(run, tmp_path, {"train_windows": 3}))
    with pytest.raises(DataError, match="point --data-root at the data of the run"):
        windows_of_run(other, prepare(dataset_named("simulator"), None, cache))
