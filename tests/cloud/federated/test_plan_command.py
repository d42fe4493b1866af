"""``strategies`` and ``plan build | show | verify`` as a user calls them."""

import json
from pathlib import Path

import onnx
import pytest
import typer
from oracles.compiled import compiled_plan
from oracles.small_federation import model
from typer.testing import CliRunner
from wearfleet_cloud.cli.plan import parse_settings, register
from wearfleet_cloud.federated import STRATEGIES, create_strategy
from wearfleet_cloud.federated.plan_files import check_plan, load_plan, save_plan
from wearfleet_cloud.training.model_files import save_model
from wearfleet_models.classifier import ModelSpec, build_classifier
from wearfleet_protos.errors import ConfigError, IntegrityError, NotFoundError, ProtocolError
from wearfleet_protos.tensors import digest_of


def call(*arguments: str) -> str:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plan, graphs = compiled_plan(create_strategy("fedbn", {}), model("cnn"), plan_id="test-plan")
    save_plan(tmp_path / "plan", plan, graphs)
    return tmp_path / "plan"


def test_strategies_are_listed_with_what_stays_local() -> None:
    rows = {row["name"]: row for row in json.loads(call("strategies", "--json"))}
    assert rows.keys() == STRATEGIES.keys()
    assert rows["fedbn"]["kept_local"] == ["NORM_AFFINE", "NORM_STAT", "COUNTER"]
    assert (rows["ditto"]["kept_local"], rows["ditto"]["kept_beside"]) == ([], ["a personal model"])
    assert rows["fedrep"]["phases"] == ["evaluate_before", "train_head", "train_body", "evaluate_after"]
    assert "async" not in rows["scaffold"]["composes_with"]
    assert "mu" in rows["fedprox"]["hyper_parameters"]
    assert rows["fedprox"]["options"].keys() >= {"mu", "learning_rate", "weighting", "codec", "codec_rank"}
    assert (rows["fednova"]["options"]["mu"], rows["fedavg"]["options"]["codec"]) == ("0.0", "float32")
    assert create_strategy("fedbuff", rows["fedbuff"]["options"]) == create_strategy("fedbuff", {})
    assert "fedprox" in call("strategies")


def test_a_saved_plan_is_shown_and_verified(folder: Path) -> None:
    shown = json.loads(call("plan", "show", str(folder), "--json"))
    assert [p["name"] for p in shown["phases"]] == ["evaluate_before", "train", "evaluate_after"]
    assert 0 < shown["upload_bytes"] < shown["download_bytes"]
    assert 0 < shown["kept_bytes"] < shown["download_bytes"]
    assert shown["upload_codec"] == "float32"
    verified = json.loads(call("plan", "verify", str(folder), "--json"))
    assert verified["valid"] is True
    assert verified["phases"][1]["operators"]["ConvTranspose"] == 1
    assert "test-plan" in call("plan", "show", str(folder))
    assert "valid" in call("plan", "verify", str(folder))


def test_a_plan_is_built_from_a_training_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save_model(build_classifier(ModelSpec("cnn", 6, 128, 6)), run)
    result = {
        "dataset": "simulator",
        "algorithm": "erm",
        "scenario": "cross-person",
        "target_subjects": ["1"],
        "scenario_seed": 0,
        "split": "random",
        "train_windows": 1,
        "validation_windows": 1,
        "labels": ["1", "2", "3", "4", "5", "6"],
    }
    (run / "result.json").write_text(json.dumps(result))
    out = tmp_path / "plan"
    arguments = ["--strategy", "fedprox", "--set", "mu=0.5", "--set", "epochs=2", "--seed", "9", "--json"]
    built = json.loads(call("plan", "build", "--run", str(run), "--out", str(out), *arguments))
    plan, graphs = load_plan(out)
    assert (plan.plan_id, plan.seed) == (built["plan_id"], 9)
    assert dict(plan.phases[1].scalars)["mu"] == 0.5
    assert plan.phases[1].loop.epochs == 2
    assert check_plan(plan, graphs)


def test_a_changed_graph_is_noticed(folder: Path) -> None:
    file = next((folder / "graphs").iterdir())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="build the plan again"):
        load_plan(folder)


def test_a_missing_graph_is_noticed(folder: Path) -> None:
    next((folder / "graphs").iterdir()).unlink()
    with pytest.raises(NotFoundError, match="plan build"):
        load_plan(folder)


def test_a_graph_that_does_not_fit_its_bindings_is_refused(folder: Path) -> None:
    plan, graphs = load_plan(folder)
    train, evaluate = plan.phases[1], plan.phases[0]
    with pytest.raises(ProtocolError, match="in the graph and"):
        check_plan(plan, {**graphs, train.graph: graphs[evaluate.graph]})


def test_a_graph_with_an_operator_of_one_vendor_is_refused(folder: Path) -> None:
    plan, graphs = load_plan(folder)
    digest = plan.phases[0].graph
    proto = onnx.load_model_from_string(graphs[digest])
    proto.opset_import.append(onnx.helper.make_opsetid("com.vendor", 1))
    proto.graph.node[0].domain = "com.vendor"
    with pytest.raises(IntegrityError, match=r"not a valid ONNX model|com\.vendor"):
        check_plan(plan, {**graphs, digest: proto.SerializeToString()})
    assert digest_of(proto.SerializeToString()) != digest


def test_junk_is_not_a_graph(folder: Path) -> None:
    plan, graphs = load_plan(folder)
    with pytest.raises(IntegrityError, match="not a valid ONNX model"):
        check_plan(plan, {**graphs, plan.phases[0].graph: b"junk"})


@pytest.mark.parametrize("settings", [["mu"], ["=1"], ["mu=1", "mu=2"]])
def test_malformed_settings_are_refused(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_settings(settings)
