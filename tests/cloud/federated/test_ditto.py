"""Ditto on the device's engine: the oracle's rounds, what stays, what a lost round leaves, the identity."""

import numpy as np
import pytest
from oracles.edge_rounds import SEED, Federation
from oracles.small_federation import arrays, model, splits
from oracles.torch_clients import Arrays, batches_of, descend, gradients, loaded
from wearfleet_cloud.federated import create_strategy
from wearfleet_edge.trainer import personal_tensors
from wearfleet_protos.errors import ConfigError

CLIENTS = {"anna": splits(1), "ben": splits(2, 32)}
OPTIONS = {
    "batch_size": 16, "learning_rate": 0.05, "personal_learning_rate": 0.03, "personal_epochs": 2, "pull": 0.5
}  # fmt: skip
ROUNDS = 3


def personal_round(own: Arrays, received: Arrays, windows, pull: float, number: int) -> Arrays:
    network = loaded(model("cnn"), own).train()
    anchor = loaded(model("cnn"), received)
    targets = dict(anchor.named_parameters())
    for batch in batches_of(windows, 16, 2, seed=SEED, round_number=number):
        direction = gradients(network, batch)
        for name, parameter in network.named_parameters():
            direction[name] += pull * (parameter.detach() - targets[name].detach())
        descend(network, 0.03, direction)
    return arrays(network)


@pytest.mark.slow
@pytest.mark.parametrize("pull", [0.0, 0.5])
def test_personal_models_are_those_of_the_oracle_given_the_received_ones(pull: float) -> None:
    """With pull 0 the oracle never looks at the received model after the first round: that is local training."""
    federation = Federation(create_strategy("ditto", {**OPTIONS, "pull": pull}), model("cnn"), CLIENTS)
    own: dict[str, Arrays] = {}
    for number in range(1, ROUNDS + 1):
        received = dict(federation.tensors)
        results = federation.round()
        for client, windows in CLIENTS.items():
            own[client] = personal_round(own.get(client, received), received, windows["train"], pull, number)
            personal = personal_tensors(federation.plan, dict(results[client].state))
            for tensor, array in own[client].items():
                if array.dtype == np.float32:
                    # at most 18 steps of float32 sums over 16 x 40 terms: 18 sqrt(640) 2^-24 = 3e-5
                    error = np.linalg.norm(personal[tensor] - array) / max(np.linalg.norm(array), 1e-3)
                    assert error < 1e-4, (number, client, tensor)


@pytest.mark.slow
def test_the_global_track_is_fedavg_to_the_bit() -> None:
    ditto = Federation(create_strategy("ditto", OPTIONS), model("cnn"), CLIENTS)
    plain = {k: OPTIONS[k] for k in ("batch_size", "learning_rate")}
    fedavg = Federation(create_strategy("fedavg", plain), model("cnn"), CLIENTS)
    for _ in range(2):
        ditto.round()
        fedavg.round()
    for tensor, array in fedavg.tensors.items():
        np.testing.assert_array_equal(ditto.tensors[tensor], array)


@pytest.mark.slow
def test_the_personal_model_is_not_sent_and_moves_only_with_a_round_that_counts() -> None:
    federation = Federation(create_strategy("ditto", OPTIONS), model("cnn"), CLIENTS)
    assert all(spec.name.startswith("personal/") for spec in federation.plan.local_specs())
    assert not set(federation.plan.local_specs()) & set(federation.plan.upload_specs())
    assert not set(federation.plan.local_specs()) & set(federation.plan.download_specs())
    federation.round()
    kept = {name: array.copy() for name, array in federation.local["ben"].items()}
    federation.round(lost=["ben"])
    for name, array in kept.items():
        np.testing.assert_array_equal(federation.local["ben"][name], array)


@pytest.mark.slow
def test_a_strong_pull_keeps_the_personal_model_at_the_received_one() -> None:
    def distance(pull: float) -> float:
        options = {**OPTIONS, "pull": pull, "personal_learning_rate": 0.01}
        federation = Federation(create_strategy("ditto", options), model("cnn"), CLIENTS)
        received = dict(federation.tensors)
        federation.round()
        own = federation.local["anna"]
        names = [n for n, _ in federation.network.named_parameters()]
        return float(np.sqrt(sum(np.sum((own[f"personal/{n}"] - received[n]) ** 2) for n in names)))

    assert distance(50.0) < 0.5 * distance(0.0)


@pytest.mark.parametrize(
    "options", [{"pull": -1}, {"personal_epochs": 0}, {"personal_learning_rate": 0}, {"pull": "inf"}]
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        create_strategy("ditto", options)
