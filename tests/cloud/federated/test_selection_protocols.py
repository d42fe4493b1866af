"""Which round's accuracy counts: known answers, the same stacked and on the wire, and training is not changed by it."""

from dataclasses import replace

import numpy as np
import pytest
from oracles.compiled import compiled_plan
from oracles.edge_rounds import SEED
from oracles.small_federation import model, splits
from wearfleet_cloud.cli.simulate import device_engine
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import Prepared, prepare
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.selection_protocols import selected
from wearfleet_cloud.federated.simulate import Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient, people, split_hash
from wearfleet_cloud.federated.stacked_clients import StackedClients
from wearfleet_cloud.federated.wire_clients import WireClients
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.windowing import LabelledWindows

PARTS = {"anna": splits(1), "ben": splits(2, 32)}
CLIENTS = [
    SimulatedClient(n, s["train"], s["holdout"], splits(7 + i)["train"])
    for i, (n, s) in enumerate(PARTS.items())
]
STRATEGY = create_strategy("fedbn", {"batch_size": 16, "learning_rate": 0.05})


def stacked(strategy):
    return StackedClients(strategy, model("cnn"), SEED)


def metrics(validation: float, test: float) -> dict[str, float]:
    """The same before and after training, of 10 and 20 windows."""
    made = {}
    for phase in ("evaluate_before", "evaluate_after"):
        made |= {f"validation/{phase}/correct": validation, f"validation/{phase}/count": 10.0}
        made |= {f"{phase}/correct": test, f"{phase}/count": 20.0}
    return made


def test_fhbench_takes_each_client_at_its_own_best_of_every_fifth_round() -> None:
    rounds = [{"a": metrics(9, 19), "b": metrics(9, 19)} for _ in range(16)]
    rounds[4] = {"a": metrics(5, 1), "b": metrics(4, 2)}
    rounds[9] = {"a": metrics(4, 3), "b": metrics(6, 4)}
    rounds[14] = {"a": metrics(5, 5)}  # ben was not in it; anna's earlier one is as good
    assert selected("fhbench", rounds) == [(1, 20), (4, 20)]
    with pytest.raises(ConfigError, match="b was in none"):
        selected("fhbench", [{"a": metrics(1, 1)}] * 5 + [rounds[0]])


def test_personalizedfl_takes_all_clients_at_the_round_of_the_best_mean_of_what_they_hold_after_it() -> None:
    rounds = [
        {"a": metrics(10, 19), "b": metrics(10, 19)},  # what they hold before any round
        {"a": metrics(2, 1), "b": metrics(8, 2)},
        {"a": metrics(10, 3)},
        {"a": metrics(6, 4), "b": metrics(5, 5)},
        {"a": metrics(1, 6), "b": metrics(8, 7)},
    ]
    assert selected("personalizedfl", rounds) == [(4, 20), (5, 20)]


@pytest.mark.parametrize("protocol", ["personalizedfl", "fhbench"])
def test_a_protocol_chooses_among_rounds_and_changes_none(protocol: str) -> None:
    measured = [replace(client, validation=client.holdout) for client in CLIENTS]
    last = simulate(STRATEGY, model("cnn"), Population(CLIENTS), Simulation(5, seed=SEED), stacked)
    simulation = Simulation(5, seed=SEED, protocol=protocol)
    chosen = simulate(STRATEGY, model("cnn"), Population(measured), simulation, stacked)
    for name, array in last.tensors.items():
        np.testing.assert_array_equal(chosen.tensors[name], array)
    assert chosen.rounds == last.rounds
    assert chosen.modes.keys() == {"personal@clients"}
    if (
        protocol == "personalizedfl"
    ):  # held-out windows choose: the best round's mean; the first is before training
        assert chosen.modes["personal@clients"].mean >= max(float(r.received or 0) for r in last.rounds[1:])


@pytest.mark.slow
def test_the_wire_measures_on_the_validation_part_what_stacked_clients_do() -> None:
    simulation = Simulation(5, seed=SEED, protocol="fhbench")
    runners = (stacked, lambda s: WireClients(*compiled_plan(s, model("cnn"), seed=SEED), device_engine))
    fast, real = (simulate(STRATEGY, model("cnn"), Population(CLIENTS), simulation, r) for r in runners)
    one, other = fast.modes["personal@clients"], real.modes["personal@clients"]
    # a window of the smaller held-out part may fall on the other side of a boundary
    assert abs(one.mean - other.mean) <= 1.0 / min(len(c.holdout) for c in CLIENTS)


def test_what_cannot_be_selected_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="5 rounds"):
        Simulation(4, protocol="fhbench")
    with pytest.raises(ConfigError, match="one of last"):
        Simulation(4, protocol="best")
    without = [replace(CLIENTS[0], validation=None), CLIENTS[1]]
    simulation = Simulation(5, CohortPolicy(), SEED, protocol="fhbench")
    with pytest.raises(ConfigError, match="anna have none"):
        simulate(STRATEGY, model("cnn"), Population(without), simulation, stacked)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(dataset_named("simulator"), None, tmp_path_factory.mktemp("cache"))


def test_people_learn_first_are_chosen_by_next_and_measured_last_and_no_sample_is_in_two_parts(
    prepared: Prepared,
) -> None:
    clients, plain = people(prepared, 3, validated=True), people(prepared, 3)
    length = prepared.dataset.spec.length
    assert split_hash(clients) != split_hash(plain)
    for client, without in zip(clients, plain, strict=True):
        np.testing.assert_array_equal(client.holdout.x, without.holdout.x)
        assert client.validation is not None
        places = [samples(part, length) for part in (client.train, client.validation, client.holdout)]
        assert not places[0] & places[1]
        assert not (places[0] | places[1]) & places[2]
        for label in np.unique(client.train.y):
            count = [int((w.y == label).sum()) for w in (client.validation, without.train)]
            assert count[0] == round(count[1] * 3 / 7)
            assert order(client.train, label)[-1] < order(client.validation, label)[0]


def samples(windows: LabelledWindows, length: int) -> set[tuple[int, int]]:
    return {
        (int(r), int(s) + i)
        for r, s in zip(windows.recording, windows.start, strict=True)
        for i in range(length)
    }


def order(windows: LabelledWindows, label: int) -> list[tuple[int, int]]:
    chosen = windows.y == label
    return list(zip(windows.recording[chosen].tolist(), windows.start[chosen].tolist(), strict=True))
