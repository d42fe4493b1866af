"""The real compiler's plans and the real exporter's models on the device's engine, held against torch."""

import time

import numpy as np
import pytest
import torch
from wearfleet_cloud.export.scored_classifier import fit_ood
from wearfleet_cloud.export.to_onnx import ReleaseInfo, export_bytes
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_cloud.federated.reference_client import run_client
from wearfleet_edge.graph import inspect_graph
from wearfleet_edge.runtime import Personal, Recogniser
from wearfleet_edge.trainer import Limits, TrainingData, personal_tensors, run_plan, start_state
from wearfleet_models import ModelSpec, build_classifier
from wearfleet_protos.plan import InputContract
from wearfleet_protos.recording import Channel
from wearfleet_protos.windowing import LabelledWindows

pytestmark = pytest.mark.slow

CONTRACT = InputContract(
    tuple(Channel(f"acc_{a}", "m/s^2") for a in "xyz"), 50.0, 64, 32, ("sit", "walk", "run")
)
SPECS = {
    "cnn": ModelSpec("cnn", 3, 64, 3),
    "transformer": ModelSpec("transformer", 3, 64, 3, feedforward=64),
}
LIMITS = Limits(600.0, 1e12, lambda: 0, time.monotonic, lambda: False)


def _windows(count, seed):
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 3, count)
    x = generator.normal(0, 1, (count, 3, 64)) + y[:, None, None]
    zeros = np.zeros(count, np.int64)
    return LabelledWindows(x.astype(np.float32), y.astype(np.int64), zeros, zeros)


@pytest.fixture(scope="module", params=SPECS)
def case(request):
    model = build_classifier(SPECS[request.param], seed=1)
    name = "fedbn" if request.param == "cnn" else "fedavg"  # a transformer has no running statistics to keep
    strategy = create_strategy(name, {"epochs": 2, "batch_size": 16})
    plan, graphs = build_plan(strategy, model, CONTRACT, plan_id="p", seed=5)
    data = TrainingData(_windows(83, 2), _windows(41, 3))
    values = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    downloaded = {spec.name: values[spec.name] for spec in plan.download_specs()}
    result = run_plan(plan, graphs, start_state(plan, downloaded, {}), data, round_number=3, limits=LIMITS)
    return model, strategy, plan, downloaded, data, result


def test_a_round_on_the_device_equals_a_round_in_torch(case):
    model, strategy, _, downloaded, data, result = case
    windows = {"train": data.train, "holdout": data.holdout}
    wanted = run_client(strategy, model, downloaded, {}, windows, seed=5, round_number=3)
    assert result.num_examples == wanted.num_examples
    for name, array in wanted.state.items():
        scale = max(float(np.abs(array).max()), 1e-6)
        # 12 steps of float32 sums over up to 16 * 64 terms: 12 * sqrt(1024) * 2**-24 is 2e-5
        assert float(np.abs(result.state[name] - array).max()) <= 2e-5 * scale, name
    assert result.metrics == pytest.approx(wanted.metrics, rel=1e-4)


def test_personal_tensors_over_the_exported_graph_equal_the_personal_torch_model(case):
    model, _, plan, _, data, result = case
    ood = fit_ood(model, data.train.x, data.train.y, data.holdout.x)
    release = ReleaseInfo("m", 1, "run", "Apache-2.0", simulated=True, created_ns=1)
    onnx_bytes, manifest = export_bytes(model, CONTRACT, ood, release)
    inspect_graph(onnx_bytes)
    own = personal_tensors(plan, result.state)
    twin = build_classifier(model.spec)
    twin.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in own.items()})
    with torch.no_grad():
        logits = twin.eval()(torch.from_numpy(data.holdout.x)).numpy()
    personal = Recogniser(onnx_bytes, manifest, Personal(own, 0.0))
    for window, wanted in zip(data.holdout.x, logits, strict=True):
        exp = np.exp(wanted - wanted.max())
        np.testing.assert_allclose(personal.recognise(window).probabilities, exp / exp.sum(), atol=2e-6)
    assert personal.evaluate(data.holdout).correct == (logits.argmax(axis=1) == data.holdout.y).sum()
    assert personal.evaluate(data.holdout).correct == result.metrics["evaluate_after/correct"]
