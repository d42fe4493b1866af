"""FedHealth 2: a preset of FedAP; its fine-tuning equals an oracle in plain torch, and shares no window."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from oracles.edge_rounds import SEED, Federation
from oracles.small_federation import CONTRACT, arrays, model, splits
from oracles.torch_clients import batches_of, loaded
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.coral import COVARIANCE, SHARED, _projection
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_protos.errors import ConfigError

TRAINING = {"batch_size": 16, "learning_rate": 0.05, "weight_source": "warmup", "warmup_rounds": 1}
CORAL = {
    "personalise": "coral_finetune",
    "coral_weight": 3.0,
    "finetune_epochs": 2,
    "finetune_learning_rate": 0.1,
}
CLIENTS = {"anna": splits(1), "ben": splits(2, 32), "cleo": splits(3, 20)}
TUNED = ("backbone.conv2.weight", "backbone.conv2.bias", "head.weight", "head.bias")
PROJECTION = _projection(model("cnn")).double()


def federation(**options: object) -> Federation:
    return Federation(create_strategy("fedhealth2", {**TRAINING, **options}), model("cnn"), CLIENTS)


def projected(network, x: np.ndarray) -> torch.Tensor:
    return network.features(torch.from_numpy(x).to(next(network.parameters()).dtype)) @ PROJECTION


@pytest.mark.slow
def test_it_is_fedap_when_the_weights_have_the_same_source() -> None:
    ours, fedap = federation(), Federation(create_strategy("fedap", TRAINING), model("cnn"), CLIENTS)
    for _ in range(2):
        ours.round()
        fedap.round()
    assert {p.graph for p in ours.plan.phases} == {p.graph for p in fedap.plan.phases}
    for found, expected in ((ours.tensors, fedap.tensors), (ours.state, fedap.state)):
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_without_a_source_it_asks_for_a_reference() -> None:
    with pytest.raises(ConfigError, match="reference=RUN"):
        build_plan(create_strategy("fedhealth2", {}), model("cnn"), CONTRACT, plan_id="p")


@pytest.mark.slow
def test_the_shared_covariance_is_that_of_all_projected_features_at_once() -> None:
    fed = federation(**CORAL)
    results = fed.round()
    features = []
    for name, result in results.items():
        network = loaded(model("cnn"), result.state).double().eval()
        with torch.no_grad():
            features.append(projected(network, CLIENTS[name]["train"].x).numpy())
    expected = np.cov(np.concatenate(features).T, bias=True)
    # float32 sums over 16 windows and 40 features in a batch, pooled over 3 batches: sqrt(640) 2^-24 of values up to 10
    np.testing.assert_allclose(fed.tensors[SHARED], expected, rtol=1e-4, atol=2e-5)
    assert {s.name for s in fed.plan.upload_specs() if "projected" in s.name} == {
        "projected/mean",
        COVARIANCE,
    }


def oracle_finetuned(
    start: dict[str, np.ndarray], shared: np.ndarray, name: str, number: int
) -> dict[str, np.ndarray]:
    network = loaded(model("cnn"), start).double().eval()
    chosen = [p for n, p in network.named_parameters() if n in TUNED]
    optimiser = torch.optim.SGD(chosen, lr=0.1)
    target = torch.from_numpy(np.array(shared)).double()
    for x, y in batches_of(CLIENTS[name]["train"], 16, 2, seed=SEED, round_number=number):
        optimiser.zero_grad()
        values = network.features(x.double()) @ PROJECTION
        covariance = torch.cov(values.T, correction=0) if len(x) > 1 else torch.zeros_like(target)
        apart = ((covariance - target) ** 2).sum() / (4 * len(target) ** 2)
        (F.cross_entropy(network(x.double()), y) + 3.0 * apart).backward()
        optimiser.step()
    return {n: t.float().numpy() for n, t in network.state_dict().items() if n in TUNED}


@pytest.mark.slow
def test_the_fine_tuning_is_the_oracles_and_leaves_low_layers_alone() -> None:
    fed = federation(**CORAL)
    fed.round()
    for name in CLIENTS:
        fed.number = 1
        start = {**fed.strategy.received(name, fed.tensors, fed.state), **fed.local[name]}
        fed.number = 2
        result, update = fed.client(name)
        expected = oracle_finetuned(start, fed.tensors[SHARED], name, 2)
        for tensor, array in expected.items():
            # 6 steps of float32 sums over 16 x 40 terms; the oracle is in float64: 6 sqrt(640) 2^-24 = 1e-5
            error = np.linalg.norm(result.state[f"personal/{tensor}"] - array) / np.linalg.norm(array)
            assert error < 5e-5, tensor
            assert not np.allclose(array, start[tensor], atol=1e-4), tensor
        for tensor in ("backbone.conv1.weight", "backbone.norm1.weight", "backbone.norm2.running_var"):
            np.testing.assert_array_equal(result.state[f"personal/{tensor}"], start[tensor])
        assert not any(tensor.startswith("personal/") for tensor in update)


@pytest.mark.slow
def test_a_stronger_pull_brings_the_covariance_nearer() -> None:
    def distance(weight: float) -> float:
        fed = federation(**{**CORAL, "coral_weight": weight, "finetune_epochs": 8})
        fed.round()
        result, _ = fed.client("anna")
        own = {n: result.state.get(f"personal/{n}", fed.tensors[n]) for n in arrays(model("cnn"))}
        network = loaded(model("cnn"), own).double().eval()
        with torch.no_grad():
            covariance = np.cov(projected(network, CLIENTS["anna"]["train"].x).numpy().T, bias=True)
        return float(np.linalg.norm(covariance - fed.tensors[SHARED]))

    assert distance(30.0) < 0.9 * distance(1e-6)


@pytest.mark.parametrize(
    "options",
    [{"personalise": "magic"}, {"coral_weight": 0}, {"finetune_epochs": 0}, {"finetune_learning_rate": -1}],
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        create_strategy("fedhealth2", options)
