"""The exported file: contract, names, nodes, overlay, determinism."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from wearfleet_cloud.export.graph_tidy import ancestors
from wearfleet_cloud.export.scored_classifier import fit_ood
from wearfleet_cloud.export.session import Session
from wearfleet_cloud.export.to_onnx import export_bytes, export_model
from wearfleet_cloud.fleet.model_contract import check_model
from wearfleet_models import tensor_specs
from wearfleet_protos.errors import ModelContractError, ShapeError
from wearfleet_protos.manifest import METADATA_KEYS, MODEL_OUTPUTS, ModelManifest
from wearfleet_protos.tensors import digest_of


def metadata(data: bytes) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props}


def patched(data: bytes, tensors: dict[str, np.ndarray]) -> bytes:
    """The graph with its initialisers replaced: what an overlay must equal."""
    model = onnx.load_from_string(data)
    for tensor in model.graph.initializer:
        if tensor.name in tensors:
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    return model.SerializeToString()


def test_metadata_carries_the_whole_contract(example):
    found, contract = metadata(example.release.data), example.contract
    assert set(found) == set(METADATA_KEYS)
    assert json.loads(found["wearfleet.labels"]) == list(contract.labels)
    assert json.loads(found["wearfleet.channels"]) == [c.name for c in contract.channels]
    assert json.loads(found["wearfleet.units"]) == [c.unit for c in contract.channels]
    assert (
        float(found["wearfleet.rate_hz"]),
        int(found["wearfleet.window"]),
        int(found["wearfleet.stride"]),
    ) == (50, 64, 32)
    assert found["wearfleet.ood_method"] == example.release.manifest.ood_method
    assert float(found["wearfleet.ood_threshold"]) == example.release.manifest.ood_threshold
    assert (found["wearfleet.simulated"], found["wearfleet.train_run"], found["wearfleet.version"]) == (
        "true",
        "run-1",
        "3",
    )


def test_graph_has_one_input_with_a_free_batch_and_four_outputs(example):
    graph = onnx.load_from_string(example.release.data).graph
    (window,) = graph.input
    sizes = [d.dim_param or d.dim_value for d in window.type.tensor_type.shape.dim]
    assert (window.name, sizes) == ("window", ["N", 3, 64])
    assert tuple(o.name for o in graph.output) == MODEL_OUTPUTS


def test_manifest_describes_the_file_and_every_tensor_of_the_model(example):
    manifest, data = example.release.manifest, example.release.data
    assert (manifest.digest, manifest.size_bytes) == (digest_of(data), len(data))
    assert manifest.tensors == tensor_specs(example.model)
    assert ModelManifest.from_bytes(manifest.to_bytes()) == manifest


def test_initialisers_have_the_names_and_values_of_the_state_dict(example):
    held = {
        t.name: numpy_helper.to_array(t)
        for t in onnx.load_from_string(example.release.data).graph.initializer
    }
    for spec in example.release.manifest.tensors:
        if spec.role != "COUNTER":  # counts training batches; inference does not read it
            np.testing.assert_array_equal(held[spec.name], example.model.state_dict()[spec.name].numpy())


def test_normalisation_layers_stay_nodes_of_their_own(cnn, transformer):
    operators = [n.op_type for n in onnx.load_from_string(cnn.release.data).graph.node]
    assert operators.count("BatchNormalization") == 2
    operators = [n.op_type for n in onnx.load_from_string(transformer.release.data).graph.node]
    assert operators.count("LayerNormalization") == 4


def personal_tensors(example) -> dict[str, np.ndarray]:
    """Every tensor of the model changed at random."""
    rng = np.random.default_rng(0)
    return {
        name: tensor.numpy() * rng.uniform(0.5, 1.5, tuple(tensor.shape)).astype(np.float32)
        for name, tensor in example.model.state_dict().items()
        if tensor.is_floating_point()
    }


def unoptimised(data: bytes, x: np.ndarray, overlay: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs without graph optimisation, with tensors handed over as initialisers."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in overlay.items()}
    for name, value in values.items():
        options.add_initializer(name, value)
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(list(MODEL_OUTPUTS), {"window": x})


def test_tensors_laid_over_the_graph_equal_a_patched_graph(example):
    personal, x = personal_tensors(example), example.x_validation[:32]
    patched_data = patched(example.release.data, personal)
    laid_over = unoptimised(example.release.data, x, personal)
    for over, patch in zip(laid_over, unoptimised(patched_data, x, {}), strict=True):
        np.testing.assert_array_equal(over, patch)
    optimised = Session(patched_data).run(x)
    for over, name in zip(laid_over, MODEL_OUTPUTS, strict=True):
        scale = np.abs(over).max()  # float32 epsilon x reduction length (~700 to 1500) x scale
        np.testing.assert_allclose(optimised[name], over, rtol=0, atol=2e-4 * max(scale, 1.0))


def test_patched_tensors_reach_torch_parity(example):
    personal, x = personal_tensors(example), example.x_validation[:32]
    model = copy.deepcopy(example.model)
    model.load_state_dict({**model.state_dict(), **{n: torch.from_numpy(a) for n, a in personal.items()}})
    logits = model(torch.from_numpy(x)).detach().numpy()
    found = Session(patched(example.release.data, personal)).run(x)["logits"]
    np.testing.assert_allclose(found, logits, rtol=0, atol=2e-4 * max(np.abs(logits).max(), 1.0))
    assert np.abs(found - Session(example.release.data).run(x)["logits"]).max() > 0.1


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_windows_give_the_same_in_any_batch(example, batch):
    session = Session(example.release.data)
    x = example.x_validation[:64]
    whole = session.run(x)
    parts = [session.run(x[i : i + batch]) for i in range(0, 64, batch)]
    for name in MODEL_OUTPUTS:
        together = np.concatenate([part[name] for part in parts])
        # the order of sums may change with the batch: float32 epsilon x reduction length (~1500) x scale
        np.testing.assert_allclose(together, whole[name], rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes(cnn):
    ood = fit_ood(cnn.model, cnn.x, cnn.y, cnn.x_validation, method="mahalanobis", rank=8)
    again, manifest = export_bytes(cnn.model, cnn.contract, ood, replace(cnn.info, created_ns=77))
    assert again == cnn.release.data
    assert manifest == replace(cnn.release.manifest, created_ns=77)


def test_file_says_nothing_about_the_machine_that_wrote_it(example):
    for word in (b"/site-packages", b".py", b"stack_trace", b"torch"):
        assert word not in example.release.data


def test_reshapes_cost_no_shape_arithmetic(example):
    operators = {n.op_type for n in onnx.load_from_string(example.release.data).graph.node}
    assert not operators & {"Shape", "Concat", "Gather"}


def test_score_does_not_feed_back_into_the_logits(cnn):
    graph = onnx.load_from_string(cnn.release.data).graph
    assert not any(name.startswith("ood.") for name in ancestors(graph, ["logits", "embedding"]))
    assert "ood.basis" in ancestors(graph, ["ood_score"])


def test_contract_of_another_shape_is_refused(cnn):
    ood = fit_ood(cnn.model, cnn.x, cnn.y, cnn.x_validation, method="energy")
    with pytest.raises(ShapeError, match=r"\(3, 64, 4\), the contract says \(3, 64, 2\)"):
        export_bytes(cnn.model, replace(cnn.contract, labels=("a", "b")), ood, cnn.info)


@pytest.mark.slow
def test_file_and_manifest_are_written_side_by_side(cnn, tmp_path):
    path = tmp_path / "deep" / "model.onnx"
    ood = fit_ood(cnn.model, cnn.x, cnn.y, cnn.x_validation, method="mahalanobis", rank=8)
    manifest = export_model(cnn.model, cnn.contract, ood, path, cnn.info)
    assert manifest == cnn.release.manifest
    assert ModelManifest.from_bytes(path.with_name("model.manifest.json").read_bytes()) == manifest
    check_model(path.read_bytes(), manifest)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.manifest.json", "model.onnx"]


def redigested(manifest: ModelManifest, data: bytes) -> ModelManifest:
    return replace(manifest, digest=digest_of(data), size_bytes=len(data))


def without_metadata(data: bytes) -> bytes:
    model = onnx.load_from_string(data)
    del model.metadata_props[:]
    return model.SerializeToString()


def with_input_renamed(data: bytes) -> bytes:
    model = onnx.load_from_string(data)
    model.graph.input[0].name = "imu"
    return model.SerializeToString()


def with_output_missing(data: bytes) -> bytes:
    model = onnx.load_from_string(data)
    del model.graph.output[-1]
    return model.SerializeToString()


def with_tensor_missing(data: bytes) -> bytes:
    model = onnx.load_from_string(data)
    del model.graph.initializer[0]
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_metadata, "metadata wearfleet.schema"),
        (with_input_renamed, "expected the input"),
        (with_output_missing, "expected the outputs"),
        (with_tensor_missing, "no initialisers"),
        (lambda _: b"\xff\xff junk", "not an ONNX file"),
    ],
)
def test_file_that_breaks_the_contract_is_refused(cnn, damage, words):
    data = damage(cnn.release.data)
    with pytest.raises(ModelContractError, match=words):
        check_model(data, redigested(cnn.release.manifest, data))


def test_changed_byte_is_refused(cnn):
    data = bytearray(cnn.release.data)
    data[len(data) // 2] ^= 1
    with pytest.raises(ModelContractError, match="sha256"):
        check_model(bytes(data), cnn.release.manifest)


def test_wrong_number_of_labels_is_refused(cnn):
    contract = replace(cnn.contract, labels=(*cnn.contract.labels, "extra"))
    with pytest.raises(ModelContractError, match="names 5 labels, the graph has 4"):
        check_model(cnn.release.data, replace(cnn.release.manifest, contract=contract))


def test_unloadable_file_is_a_typed_error():
    with pytest.raises(ModelContractError, match="does not load"):
        Session(b"not a model")


def test_windows_of_the_wrong_rank_are_refused(cnn):
    with pytest.raises(ShapeError, match="at least one window"):
        Session(cnn.release.data).run(cnn.x_validation[0])
