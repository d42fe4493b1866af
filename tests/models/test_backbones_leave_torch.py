"""Every network exports to an ONNX file that computes the same, and has a training plan or says why not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from oracles.plan_runner import open_graph, run_step
from wearfleet_cloud.export.parity import parity_report, require_parity
from wearfleet_cloud.export.scored_classifier import fit_ood, scored_classifier
from wearfleet_cloud.export.to_onnx import ReleaseInfo, export_bytes
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_cloud.federated.plan_compiler import operators_of
from wearfleet_models import BACKBONES, NECKS, Classifier, ModelSpec, build_classifier
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.plan import InputContract
from wearfleet_protos.recording import Channel

CONTRACT = InputContract(tuple(Channel(a, "m/s^2") for a in "xyz"), 50.0, 64, 32, ("sit", "walk", "run"))
WITHOUT_PLAN = {"deep-conv-lstm"}


SPECS = {
    **{name: ModelSpec(name, 3, 64, 3, kernel=3, feedforward=32) for name in BACKBONES},
    **{
        f"cnn, {name}": ModelSpec("cnn", 3, 64, 3, kernel=3, neck=name, neck_width=16, domains=4)
        for name in NECKS
        if name != "none"
    },
    "several sensors": ModelSpec("multimodal-transformer", 3, 64, 3, feedforward=32, modalities=(0, 1, 0)),
}


def model(name: str) -> Classifier:
    return build_classifier(SPECS[name], seed=1)


def _trained(model: Classifier, x: np.ndarray, y: np.ndarray) -> Classifier:
    """Twenty steps: statistics and features as of a model in use, not those of random weights."""
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(20):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimiser.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_the_exported_file_computes_what_torch_computes(name: str) -> None:
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = (generator.normal(0, 1, (120, 3, 64)) + y[:, None, None]).astype(np.float32)
    trained = _trained(model(name), x, y)
    ood = fit_ood(trained, x, y, x[:40], rank=8)
    release = ReleaseInfo("m", 1, "run", "Apache-2.0", simulated=True, created_ns=1)
    data, manifest = export_bytes(trained, CONTRACT, ood, release)
    require_parity(parity_report(scored_classifier(trained, ood), data, x))
    assert {spec.name for spec in manifest.tensors} == set(trained.state_dict())
    floats = {
        tensor.name
        for tensor in onnx.load_model_from_string(data).graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.name.startswith("ood.")
    }
    # acceptance test T17: backbone, neck, head and their statistics, and nothing that only training needs
    assert floats == {n for n, tensor in trained.state_dict().items() if tensor.is_floating_point()}
    assert ("LSTM" in operators_of(data)) == (name == "deep-conv-lstm")


@pytest.mark.slow
def test_the_exported_file_leaves_out_a_sensor_that_stands_still() -> None:
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = (generator.normal(0, 1, (120, 3, 64)) + y[:, None, None]).astype(np.float32)
    x[1::3, ::2] = generator.normal(0, 9, (40, 1, 1))  # any number, held throughout a window
    x[2::3, 1] = 0.0
    trained = _trained(model("several sensors"), x, y)
    ood = fit_ood(trained, x, y, x[:40], rank=8)
    release = ReleaseInfo("m", 1, "run", "Apache-2.0", simulated=True, created_ns=1)
    data, _ = export_bytes(trained, CONTRACT, ood, release)
    require_parity(parity_report(scored_classifier(trained, ood), data, x))
    (embedding,) = open_graph(data).run(["embedding"], {"window": x})
    gone = [np.all(embedding[:, part] == 0, axis=1) for part in (slice(0, 128), slice(128, 192))]
    assert [np.flatnonzero(sensor).tolist() for sensor in gone] == [[*range(1, 120, 3)], [*range(2, 120, 3)]]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SPECS.keys() - WITHOUT_PLAN))
def test_a_training_plan_has_standard_operators_only_and_its_step_is_that_of_torch(name: str) -> None:
    network = model(name).train()
    strategy = create_strategy("fedavg", {"batch_size": 16, "learning_rate": 0.05})
    plan, graphs = build_plan(strategy, network, CONTRACT, plan_id="p")
    phase = plan.phases[1]
    assert phase.name == "train"
    assert all(operators_of(data) for data in graphs.values())
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(16, 3, 64)).astype(np.float32), np.arange(16) % 3
    weight, key = (np.arange(16) < 13).astype(np.float32), np.asarray(5, np.int64)
    before = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    batch = {"x": x, "y": y, "weight": weight, "rng": key}
    changed, _ = run_step(open_graph(graphs[phase.graph]), phase, before, batch)
    network.double()  # in float32 a rectifier near 0 may switch, differently on every processor
    optimiser = torch.optim.SGD(network.parameters(), 0.05)
    given = [torch.from_numpy(array) for array in (x.astype(float), weight.astype(float), key)]
    each = torch.nn.functional.cross_entropy(network(*given), torch.from_numpy(y), reduction="none")
    ((each * given[1]).sum() / given[1].sum()).backward()
    optimiser.step()
    after = network.state_dict()
    assert changed.keys() <= after.keys()
    for tensor in changed:
        # one step of size 0.05 from float32 sums of at most 10^4 terms of order 1: eps x sqrt(10^4) x 0.05 = 6e-7
        np.testing.assert_allclose(changed[tensor], after[tensor].numpy(), rtol=1e-5, atol=2e-6)
    assert {n for n, p in network.named_parameters() if bool((p.grad != 0).any())} <= changed.keys()


@pytest.mark.parametrize("backbone", sorted(WITHOUT_PLAN))
def test_a_backbone_without_a_plan_is_refused_by_name_of_the_operator(backbone: str) -> None:
    with pytest.raises(ConfigError, match=r"rnn.*has no ONNX form"):
        build_plan(create_strategy("fedavg", {}), model(backbone), CONTRACT, plan_id="p")
