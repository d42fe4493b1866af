"""Static int8: what is quantised, what it costs, when it is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from wearfleet_cloud.export.quantize import QuantizedModel, balanced_choice, quantize, require_budget
from wearfleet_cloud.export.session import Session
from wearfleet_cloud.fleet.model_contract import check_model
from wearfleet_protos.errors import ConfigError, IntegrityError, ModelContractError, ShapeError


def quantized(example, budget: float = 0.05, y_validation: np.ndarray | None = None) -> QuantizedModel:
    return quantize(
        example.release.data,
        example.release.manifest,
        x=example.x,
        y=example.y,
        x_validation=example.x_validation,
        y_validation=example.y_validation if y_validation is None else y_validation,
        budget=budget,
    )


@pytest.fixture(scope="module")
def small(cnn) -> QuantizedModel:
    return quantized(cnn)


def test_int8_model_is_smaller_and_nearly_as_good(example):
    result = quantized(example)
    assert result.report.size_int8 == len(result.data) < result.report.size_float32
    assert result.report.loss <= 0.05
    assert result.report.argmax_agreement > 0.9
    assert result.report.latency_int8.p50_us > 0
    check_model(result.data, result.manifest)


def test_convolution_weights_are_int8_per_output_channel(small):
    graph = onnx.load_from_string(small.data).graph
    held = {t.name: t for t in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    convolutions = [n for n in graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 2
    for node in convolutions:
        dequantize = producer[node.input[1]]
        weight, scale = held[dequantize.input[0]], held[dequantize.input[1]]
        assert (dequantize.op_type, weight.data_type) == ("DequantizeLinear", onnx.TensorProto.INT8)
        assert list(scale.dims) == [weight.dims[0]]


def test_head_and_score_stay_float32(small):
    graph = onnx.load_from_string(small.data).graph
    held = {t.name: t.data_type for t in graph.initializer}
    assert held["head.weight"] == held["ood.basis"] == onnx.TensorProto.FLOAT


def test_threshold_is_measured_again_on_the_quantised_graph(cnn, small):
    scores = Session(small.data).run(cnn.x_validation)["ood_score"]
    assert small.manifest.ood_threshold == pytest.approx(
        np.percentile(scores.astype(np.float64), 95), rel=1e-12
    )
    assert small.manifest.ood_threshold != cnn.release.manifest.ood_threshold


def test_quantised_model_promises_no_tensors_to_lay_over(cnn, small):
    assert small.manifest.tensors == ()
    assert small.manifest.schema_hash != cnn.release.manifest.schema_hash
    with pytest.raises(ModelContractError, match="no initialisers"):
        check_model(small.data, replace(small.manifest, tensors=cnn.release.manifest.tensors))


def test_report_counts_every_class_that_occurs(cnn, small):
    assert [row[0] for row in small.report.per_class] == list(cnn.contract.labels)
    before = sum(
        row[1] * (cnn.y_validation == label).sum() for label, row in enumerate(small.report.per_class)
    )
    assert before / len(cnn.y_validation) == pytest.approx(small.report.accuracy_float32)


def test_model_that_loses_more_than_the_budget_is_refused(cnn):
    # validation labelled by the float32 model itself: whatever int8 changes is a loss
    predicted = Session(cnn.release.data).run(cnn.x_validation)["logits"].argmax(axis=1)
    report = replace(quantized(cnn, 1.0, predicted).report, accuracy_int8=0.98)
    assert report.accuracy_float32 == 1.0
    require_budget(report, 0.021)
    with pytest.raises(IntegrityError, match=r"int8 loses 2\.00% accuracy, at most 1\.00%"):
        require_budget(report, 0.01)


def test_miscalibrated_model_is_refused_by_quantize_itself(cnn):
    flat = np.full_like(cnn.x, 9.8)  # calibration that never saw a movement: all activations saturate
    with pytest.raises(IntegrityError, match="keep float32, or raise the budget"):
        quantize(
            cnn.release.data,
            cnn.release.manifest,
            x=flat,
            y=cnn.y,
            x_validation=cnn.x_validation,
            y_validation=cnn.y_validation,
        )


def test_rare_classes_calibrate_as_much_as_common_ones():
    y = np.array([0] * 1000 + [1] * 40 + [2] * 5, np.int64)
    chosen = balanced_choice(y, per_class=32)
    assert np.bincount(y[chosen]).tolist() == [32, 32, 5]
    assert (np.diff(chosen) > 0).all()


def test_calibration_needs_windows():
    with pytest.raises(ShapeError, match="at least one window"):
        balanced_choice(np.empty(0, np.int64))


@pytest.mark.parametrize("budget", [-0.1, 1.5])
def test_budget_outside_zero_to_one_is_refused(cnn, budget):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        quantized(cnn, budget)


def test_equal_inputs_give_equal_int8_bytes(cnn, small):
    assert quantized(cnn).data == small.data
