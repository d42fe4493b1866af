"""SCAFFOLD on the device's engine: the oracle's rounds, its identities, lost updates, refusals."""

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from oracles.edge_rounds import SEED, Federation
from oracles.small_federation import arrays, model, splits
from oracles.torch_clients import Arrays, batches_of, descend, gradients, loaded
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Averaging, Contribution
from wearfleet_cloud.federated.fedavg import FedAvg
from wearfleet_cloud.federated.scaffold import Scaffold
from wearfleet_cloud.federated.training_options import LocalTraining
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.tensors import encode_tensors

RATE = 0.05
CLIENTS = {"anna": splits(1), "ben": splits(2, 32), "cleo": splits(3, 20)}
LOCAL = LocalTraining(learning_rate=RATE, batch_size=16, epochs=2)
PARAMETERS = [n for n, _ in model("cnn").named_parameters()]


class Oracle:
    """Algorithm 1 with option II in plain torch; controls are lists of float64 tensors by name."""

    def __init__(self) -> None:
        self.x = arrays(model("cnn"))
        self.c = {n: np.zeros(self.x[n].shape) for n in PARAMETERS}
        self.own: dict[str, Arrays] = {}

    def round(self, members: list[str], number: int, population: int) -> None:
        moved, changes = [], []
        for client in members:
            own = self.own.get(client, {n: np.zeros_like(a) for n, a in self.c.items()})
            network = loaded(model("cnn"), self.x).train()
            correction = {n: torch.from_numpy((self.c[n] - own[n]).astype(np.float32)) for n in PARAMETERS}
            steps = 0
            for batch in batches_of(CLIENTS[client]["train"], 16, 2, seed=SEED, round_number=number):
                grads = gradients(network, batch)
                descend(network, RATE, {n: g + correction[n] for n, g in grads.items()})
                steps += 1
            y = arrays(network)
            new = {
                n: own[n] - self.c[n] + (self.x[n].astype(float) - y[n]) / (steps * RATE) for n in PARAMETERS
            }
            moved.append({n: y[n].astype(float) - self.x[n] for n in PARAMETERS})
            changes.append({n: new[n] - own[n] for n in PARAMETERS})
            self.own[client] = new
        for n in PARAMETERS:
            self.x[n] = (self.x[n] + np.mean([m[n] for m in moved], axis=0)).astype(np.float32)
            self.c[n] += len(members) / population * np.mean([c[n] for c in changes], axis=0)


def near(
    found: Mapping[str, np.ndarray], prefix: str, expected: Mapping[str, np.ndarray], most: float
) -> None:
    for name in PARAMETERS:
        scale = max(float(np.linalg.norm(expected[name])), 1e-2)
        assert np.linalg.norm(found[prefix + name] - expected[name]) / scale < most, prefix + name


@pytest.mark.slow
def test_rounds_on_the_device_with_partial_participation_are_those_of_the_oracle() -> None:
    federation, oracle = Federation(Scaffold(clients=3, local=LOCAL), model("cnn"), CLIENTS), Oracle()
    for number, members in enumerate((["anna", "ben", "cleo"], ["anna", "cleo"], ["ben", "cleo"]), start=1):
        federation.round(members)
        oracle.round(members, number, 3)
        # statistics of normalisation are pooled, which the tests of the average hold; the oracle takes them over
        oracle.x |= {n: a for n, a in federation.tensors.items() if n in oracle.x and n not in PARAMETERS}
        # 6 steps a round of float32 sums over 16 x 40 terms: 6 sqrt(640) 2^-24 = 9e-6 of a gradient's size;
        # controls divide the parameters' rounding, 2^-24 |x|, by K rate |g| with |g| down to 1e-2 |x|
        near(federation.tensors, "", oracle.x, 1e-4)
        near(federation.tensors, "control/", oracle.c, 1e-3)
        for client in members:
            near(federation.local[client], "own_control/", oracle.own[client], 1e-3)


def test_with_everyone_the_servers_control_is_the_mean_of_the_clients() -> None:
    federation = Federation(Scaffold(local=LOCAL), model("cnn"), CLIENTS)
    for _ in range(2):
        federation.round()
    mean = {
        n: np.mean([federation.local[c][f"own_control/{n}"].astype(float) for c in CLIENTS], axis=0)
        for n in PARAMETERS
    }
    for name, array in mean.items():  # float32 sums: a few roundings of the largest control
        largest = max(np.abs(federation.local[c][f"own_control/{name}"]).max() for c in CLIENTS)
        np.testing.assert_allclose(federation.tensors[f"control/{name}"], array, atol=8 * 2**-24 * largest)


def test_while_controls_are_zero_it_is_fedavg_with_equal_weights_to_the_bit() -> None:
    scaffold = Federation(Scaffold(local=LOCAL), model("cnn"), CLIENTS)
    fedavg = Federation(FedAvg(LOCAL, Averaging("uniform")), model("cnn"), CLIENTS)
    scaffold.round()
    fedavg.round()
    for name, array in fedavg.tensors.items():
        np.testing.assert_array_equal(scaffold.tensors[name], array)


def test_a_lost_update_leaves_the_clients_control_and_the_servers_sum_as_they_were() -> None:
    federation = Federation(Scaffold(clients=3, local=LOCAL), model("cnn"), CLIENTS)
    federation.round()
    before = {n: a.copy() for n, a in federation.local["ben"].items()}
    control = {n: federation.tensors[f"control/{n}"].copy() for n in PARAMETERS}
    own = {c: federation.local[c] for c in ("anna", "cleo")}
    federation.round(lost=["ben"])
    for name, array in before.items():
        np.testing.assert_array_equal(federation.local["ben"][name], array)
    for n in PARAMETERS:
        change = sum(
            federation.local[c][f"own_control/{n}"].astype(float) - own[c][f"own_control/{n}"] for c in own
        )
        largest = np.abs(federation.tensors[f"control/{n}"]).max() + np.abs(control[n]).max()
        np.testing.assert_allclose(
            federation.tensors[f"control/{n}"], control[n] + change / 3, atol=16 * 2**-24 * (largest + 1e-3)
        )


@pytest.mark.slow
def test_who_was_away_for_long_begins_with_the_servers_control() -> None:
    strict, patient = (
        Federation(Scaffold(clients=3, local=LOCAL, **options), model("cnn"), CLIENTS)
        for options in ({"control_rounds": 1}, {})
    )
    for federation in (strict, patient):
        federation.round()
        federation.round(["anna", "cleo"])
    kept, same = strict.client("ben")[1], patient.client("ben")[1]
    for name, array in kept.items():  # one aggregation missed is not more than one
        np.testing.assert_array_equal(array, same[name], err_msg=name)
    for federation in (strict, patient):
        federation.round(["anna", "cleo"])
    dropped, other = strict.client("ben")[1], patient.client("ben")[1]
    assert not np.array_equal(dropped["head.weight"], other["head.weight"])
    patient.local["ben"] = dict(patient.local["ben"]) | {
        f"own_control/{n}": patient.tensors[f"control/{n}"] for n in PARAMETERS
    }
    wanted = patient.client("ben")[1]
    for name, array in dropped.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def updates_of(federation: Federation) -> list[Contribution]:
    results = {name: federation.client(name) for name in CLIENTS}
    return [Contribution(n, r.num_examples, lambda u=u: u) for n, (r, u) in results.items()]


@pytest.mark.slow
def test_arrival_order_changes_not_one_bit_and_the_population_grows() -> None:
    strategy = Scaffold(local=LOCAL)
    federation = Federation(strategy, model("cnn"), CLIENTS)
    specs, updates = federation.plan.tensors, updates_of(federation)
    folds = [
        strategy.server(specs, federation.tensors, {}, order) for order in itertools.permutations(updates)
    ]
    assert len({encode_tensors(fold.tensors) for fold in folds}) == 1
    assert folds[0].state["population"] == 3
    small = strategy.server(specs, federation.tensors, {}, updates[:2])
    grown = strategy.server(specs, small.tensors, small.state, updates)
    assert (small.state["population"], grown.state["population"]) == (2, 3)
    name = "control/head.bias"
    change = np.mean([u.load()["control_change/head.bias"].astype(float) for u in updates], axis=0)
    np.testing.assert_allclose(
        grown.tensors[name], 2 / 3 * small.tensors[name] + change, rtol=1e-6, atol=1e-9
    )


def test_more_clients_than_there_are_is_refused() -> None:
    strategy = Scaffold(clients=2, local=LOCAL)
    federation = Federation(strategy, model("cnn"), CLIENTS)
    with pytest.raises(AggregationError, match="told there are 2"):
        strategy.server(federation.plan.tensors, federation.tensors, {}, updates_of(federation))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"optimiser": "adam"},
        {"weight_decay": 0.1},
        {"clients": -1},
        {"control_rounds": 0},
        {"server_learning_rate": 0},
    ],
)
def test_what_makes_the_controls_wrong_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        create_strategy("scaffold", options)
