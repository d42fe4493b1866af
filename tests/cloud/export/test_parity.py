"""Torch against ONNX Runtime, and that a planted error is found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from wearfleet_cloud.export.parity import parity_report, require_parity
from wearfleet_cloud.export.scored_classifier import ScoredClassifier, fit_ood, scored_classifier
from wearfleet_protos.errors import IntegrityError, ShapeError


def scored_of(example) -> ScoredClassifier:
    method = example.release.manifest.ood_method
    return scored_classifier(
        example.model,
        fit_ood(example.model, example.x, example.y, example.x_validation, method=method, rank=8),
    )


def planted(data: bytes, name: str, factor: float) -> bytes:
    """The same file with one initialiser scaled."""
    model = onnx.load_from_string(data)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    return model.SerializeToString()


def test_export_computes_what_torch_computes(example):
    report = example.release.parity
    assert report.windows == len(example.x_validation)
    assert report.argmax_agreement == 1.0
    assert report.max_abs_difference < 1e-4
    assert all(output.max_abs_difference <= output.tolerance for output in report.outputs)


def test_both_scores_are_compared(cnn):
    for method in ("energy", "mahalanobis"):
        scored = scored_classifier(
            cnn.model, fit_ood(cnn.model, cnn.x, cnn.y, cnn.x_validation, method=method, rank=8)
        )
        report = parity_report(scored, cnn.release.data, cnn.x_validation)
        (score,) = [o for o in report.outputs if o.name == "ood_score"]
        assert (score.max_abs_difference <= score.tolerance) == (method == cnn.release.manifest.ood_method)


@pytest.mark.parametrize(
    "name", ["head.weight", "backbone.conv1.weight", "backbone.norm2.running_var", "ood.centres"]
)
def test_planted_error_of_one_percent_is_found(cnn, name):
    report = parity_report(scored_of(cnn), planted(cnn.release.data, name, 1.01), cnn.x_validation)
    with pytest.raises(IntegrityError, match="do not ship it"):
        require_parity(report)


def test_planted_error_that_changes_a_class_is_found(cnn):
    report = parity_report(scored_of(cnn), planted(cnn.release.data, "head.weight", -1.0), cnn.x_validation)
    assert report.argmax_agreement < 1.0
    with pytest.raises(IntegrityError, match="names another class"):
        require_parity(report)


def test_not_a_number_is_never_within_tolerance(example):
    outputs = (
        *example.release.parity.outputs[:-1],
        replace(example.release.parity.outputs[-1], max_abs_difference=np.nan),
    )
    with pytest.raises(IntegrityError, match="ood_score"):
        require_parity(replace(example.release.parity, outputs=outputs))


def test_parity_needs_windows(cnn):
    with pytest.raises(ShapeError, match="at least one window"):
        parity_report(scored_of(cnn), cnn.release.data, cnn.x[:0])
