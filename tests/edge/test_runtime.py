"""A model is checked before it is used, and recognises what NumPy computes by hand."""

from dataclasses import replace

import numpy as np
import pytest
from edge.tiny_graphs import TENSORS, make_release, reference_logits
from onnx import helper
from wearfleet_edge.runtime import Latency, Personal, Recogniser
from wearfleet_protos.errors import IntegrityError, ModelContractError, ShapeError
from wearfleet_protos.windowing import LabelledWindows


def _windows(count, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (count, 3, 8)).astype(np.float32)


def test_recognition_equals_the_reference():
    recogniser = Recogniser(*make_release())
    for window in _windows(20):
        logits = reference_logits(window[None])[0]
        said = recogniser.recognise(window)
        assert said.label == logits.argmax()
        exp = np.exp(logits - logits.max())
        np.testing.assert_allclose(said.probabilities, exp / exp.sum(), rtol=1e-5)
        assert said.ood_score == pytest.approx(-logits.max(), rel=1e-5)
        assert said.out_of_distribution == (said.ood_score > 0.5)
        assert said.inference_ns > 0


def test_recognitions_do_not_share_memory():
    recogniser = Recogniser(*make_release())
    first = recogniser.recognise(_windows(1, 0)[0])
    before = first.probabilities.copy()
    recogniser.recognise(_windows(1, 1)[0])
    np.testing.assert_array_equal(first.probabilities, before)


@pytest.mark.parametrize("shape", [(3, 7), (2, 8), (8, 3), (1, 3, 8)])
def test_window_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ShapeError, match=r"\(3, 8\)"):
        Recogniser(*make_release()).recognise(np.zeros(shape, np.float32))


def test_window_of_the_wrong_dtype_is_refused():
    with pytest.raises(ShapeError, match="float32"):
        Recogniser(*make_release()).recognise(np.zeros((3, 8)))


def test_values_that_overflow_are_an_error_not_a_recognition():
    window = np.full((3, 8), 3e38, np.float32)
    with pytest.raises(ShapeError, match="NaN or infinity"):
        Recogniser(*make_release()).recognise(window)


def test_tampered_model_is_refused():
    data, manifest = make_release()
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        Recogniser(bytes(changed), manifest)


@pytest.mark.parametrize("output", ["logits", "probabilities", "embedding", "ood_score"])
def test_model_without_an_output_is_refused(output):
    with pytest.raises(ModelContractError, match=output):
        Recogniser(*make_release(drop_output=output))


@pytest.mark.parametrize(
    "key", ["wearfleet.labels", "wearfleet.units", "wearfleet.ood_threshold", "wearfleet.rate_hz"]
)
@pytest.mark.parametrize("value", [None, "other"])
def test_model_whose_metadata_differ_from_the_manifest_is_refused(key, value):
    with pytest.raises(ModelContractError, match=key):
        Recogniser(*make_release(metadata={key: value}))


def test_model_for_other_windows_is_refused():
    data, manifest = make_release(metadata={"wearfleet.window": "16"})
    other = replace(manifest, contract=replace(manifest.contract, window=16))
    with pytest.raises(ModelContractError, match=r"\[N, 3, 16\]"):
        Recogniser(data, other)


def test_model_with_a_custom_operator_is_refused_before_it_runs():
    node = helper.make_node("FusedGemm", ["embedding", "head.weight"], ["extra"], domain="com.microsoft")
    with pytest.raises(IntegrityError, match=r"com\.microsoft"):
        Recogniser(*make_release(extra_nodes=(node,)))


def test_personal_tensors_change_the_answer_as_a_model_with_them_would():
    data, manifest = make_release()
    own = {**TENSORS, "head.bias": np.array([-2.0, 2.0], np.float32), "norm.mean": np.ones(3, np.float32)}
    personal = Recogniser(data, manifest, Personal(own, -9.0))
    assert personal.personalised
    for window in _windows(10):
        said = personal.recognise(window)
        logits = reference_logits(window[None], own)[0]
        assert said.label == logits.argmax()
        assert said.ood_score == pytest.approx(-logits.max(), rel=1e-4)
        assert said.out_of_distribution == (said.ood_score > -9.0)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"head.bias": np.zeros(3, np.float32)}, "head.bias"),
        ({"nobody": np.zeros(2, np.float32)}, "not part of the model"),
    ],
)
def test_personal_tensors_that_do_not_fit_are_refused(tensors, words):
    with pytest.raises(ModelContractError, match=words):
        Recogniser(*make_release(), Personal(tensors, 0.0))


def test_personal_tensors_with_nan_are_refused():
    with pytest.raises(ShapeError, match="NaN"):
        Recogniser(*make_release(), Personal({"head.bias": np.array([np.nan, 0], np.float32)}, 0.0))


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_evaluation_counts_every_labelled_window_once(count):
    x = _windows(count)
    y = np.arange(count, dtype=np.int64) % 3 - 1  # a third has no label
    zeros = np.zeros(count, np.int64)
    result = Recogniser(*make_release()).evaluate(LabelledWindows(x, y, zeros, zeros))
    known = y >= 0
    said = reference_logits(x).argmax(axis=1)
    assert result.count == known.sum()
    assert result.correct == (said[known] == y[known]).sum()
    assert result.confusion.sum() == result.count
    assert result.accuracy == (result.correct / result.count if result.count else 0.0)


def test_ood_scores_equal_the_reference_for_any_number_of_windows():
    recogniser = Recogniser(*make_release())
    for count in (0, 1, 33):
        x = _windows(count)
        wanted = -reference_logits(x).max(axis=1) if count else np.empty(0)
        np.testing.assert_allclose(recogniser.ood_scores(x), wanted, rtol=1e-5)


def test_latency_forgets_the_oldest_times():
    latency = Latency(size=3)
    assert latency.quantile_us(0.5) == 0.0
    for time_ns in (9_000_000, 1_000, 2_000, 3_000):
        latency.add(time_ns)
    assert latency.quantile_us(0.5) == 2.0
    assert latency.quantile_us(1.0) == 3.0
