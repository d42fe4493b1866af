"""Simulated attackers: what they change and what not, what a simulation shows of them, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from oracles.small_federation import CLASSES, model, splits
from typer.testing import CliRunner
from wearfleet_cloud.cli.simulate import register
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.attacks import ATTACKS, Attack, Attackers, chosen_attackers, flipped, spoilt
from wearfleet_cloud.federated.simulate import Outcome, Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import StackedClients
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

NAMES = tuple(f"person-{i}" for i in range(5))
CLIENTS = tuple(
    SimulatedClient(name, s["train"], s["holdout"])
    for name, s in ((name, splits(i, 32, 16)) for i, name in enumerate(NAMES))
)
BAD = frozenset({"person-1"})
SPECS = (
    TensorSpec("w", "float32", (2,), TensorRole.SHARED, TensorGroup.PARAM),
    TensorSpec("v", "float32", (2,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
    TensorSpec("n", "int64", (), TensorRole.COUNTER, TensorGroup.BUFFER),
)
UPDATE = {
    "w": np.asarray([1.0, -2.0], np.float32),
    "v": np.asarray([0.5, 0.5], np.float32),
    "n": np.asarray(7, np.int64),
}
FIRST = {name: array * 2 for name, array in UPDATE.items()}


def outcome(attack: str, rounds: int = 1, **options: object) -> Outcome:
    strategy = create_strategy("fedavg", {"batch_size": 16, "learning_rate": 0.05, **options})
    network = model("cnn")
    population = Population(CLIENTS)
    return simulate(
        strategy,
        network,
        population,
        Simulation(rounds, seed=1),
        lambda s: Attackers(StackedClients(s, network, 1), attack, BAD, CLASSES),
    )


@pytest.mark.parametrize(
    ("attack", "w"),
    [
        ("sign-flip", [-1.0, 2.0]),
        ("scaled", [-8.0, 16.0]),
        ("nan", [np.nan, np.nan]),
        ("label-flip", [1.0, -2.0]),
        ("inflated", [1.0, -2.0]),
    ],
)
def test_an_attack_changes_what_was_trained_and_nothing_else(attack: str, w: list[float]) -> None:
    found = spoilt(attack, UPDATE, SPECS, FIRST)
    np.testing.assert_array_equal(found["w"], np.asarray(w, np.float32))
    np.testing.assert_array_equal(found["v"], UPDATE["v"])
    assert found["n"] == 7
    assert {name: a.dtype for name, a in found.items()} == {name: a.dtype for name, a in UPDATE.items()}


def test_a_replay_is_the_first_update() -> None:
    assert spoilt("replay", UPDATE, SPECS, FIRST) is FIRST


def test_flipped_labels_are_learned_and_not_measured() -> None:
    client = CLIENTS[0]
    found = flipped(client, CLASSES)
    np.testing.assert_array_equal(found.train.y + client.train.y, CLASSES - 1)
    np.testing.assert_array_equal(flipped(found, CLASSES).train.y, client.train.y)
    assert found.holdout is client.holdout
    assert found.train.x is client.train.x


def test_the_share_is_rounded_down_and_the_seed_says_who() -> None:
    assert [len(chosen_attackers(NAMES, share, 0)) for share in (0.0, 0.19, 0.2, 0.6, 0.99)] == [
        0,
        0,
        1,
        3,
        4,
    ]
    assert len(chosen_attackers([str(i) for i in range(30)], 0.3, 0)) == 9  # 0.3 * 30 is just below 9
    assert chosen_attackers(NAMES, 0.4, 3) == chosen_attackers(NAMES[::-1], 0.4, 3)
    assert len({chosen_attackers(NAMES, 0.4, seed) for seed in range(20)}) > 1


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_simulated_attack_is_the_same_every_time_and_leaves_honest_clients_alone(attack: str) -> None:
    strategy = create_strategy("fedavg", {"batch_size": 16})
    network = model("cnn")
    honest = StackedClients(strategy, network, 1)
    start = [{n: t.numpy() for n, t in network.state_dict().items()}] * len(CLIENTS)
    plain = honest.run(1, CLIENTS, start, {})
    found = Attackers(honest, attack, BAD, CLASSES).run(1, CLIENTS, start, {})
    again = Attackers(honest, attack, BAD, CLASSES).run(1, CLIENTS, start, {})
    for before, after, repeated in zip(plain, found, again, strict=True):
        same = {n: np.array_equal(after.update[n], a) for n, a in before.update.items()}
        assert all(same.values()) == (before.client not in BAD or attack == "replay")
        for name, array in after.update.items():
            np.testing.assert_array_equal(repeated.update[name], array)
        lies = before.client in BAD and attack == "inflated"
        assert after.num_examples == before.num_examples * (1000 if lies else 1)


def test_a_replay_sends_the_first_round_again() -> None:
    strategy = create_strategy("fedavg", {"batch_size": 16})
    network = model("cnn")
    runner = Attackers(StackedClients(strategy, network, 1), "replay", BAD, CLASSES)
    start = [{n: t.numpy() for n, t in network.state_dict().items()}] * len(CLIENTS)
    first, second = (runner.run(number, CLIENTS, start, {}) for number in (1, 2))
    for before, after in zip(first, second, strict=True):
        assert (before.update is after.update) == (before.client in BAD)


def test_nan_is_refused_before_any_rule_and_the_round_goes_on() -> None:
    found = outcome("nan", 2)
    assert [r.refused for r in found.rounds] == [("person-1",)] * 2
    without = simulate(
        create_strategy("fedavg", {"batch_size": 16, "learning_rate": 0.05}),
        model("cnn"),
        Population([c for c in CLIENTS if c.name not in BAD]),
        Simulation(2, seed=1),
        lambda s: StackedClients(s, model("cnn"), 1),
    )
    for name, array in without.tensors.items():  # stacked beside another client: sums in another order
        np.testing.assert_allclose(found.tensors[name], array, rtol=1e-3, atol=1e-5)


def test_a_rule_points_at_the_attacker() -> None:
    found = outcome("scaled", 2, rule="median", attackers=1)
    assert all(r.suspects == ("person-1",) for r in found.rounds)
    assert outcome("scaled").rounds[0].suspects == ()  # a mean judges nobody


def test_a_median_bears_what_a_mean_does_not() -> None:
    honest = outcome("replay").tensors
    gap = {}
    for rule in ("mean", "median"):
        options = {} if rule == "mean" else {"rule": rule, "attackers": 1}
        tensors = outcome("scaled", **options).tensors
        gap[rule] = sum(
            float(np.sum((np.asarray(tensors[n], np.float64) - a) ** 2)) for n, a in honest.items()
        )
    assert gap["median"] < 0.1 * gap["mean"]


def test_rounds_that_a_rule_skips_keep_the_model() -> None:
    with pytest.raises(
        AggregationError, match="every round was skipped; the first: rule bulyan with 1 attackers needs"
    ):
        outcome("scaled", rule="bulyan", attackers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": "bribe", "attacker_share": 0.1}, "unknown attack 'bribe'; known: none, label-flip"),
        ({"attack": "nan"}, "give both"),
        ({"attacker_share": 0.1}, "give both"),
        ({"attack": "nan", "attacker_share": 1.0}, "below 1"),
    ],
)
def test_attacks_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Attack(**options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_simulates_attackers(tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    arguments = ["--strategy", "fedavg", "--dataset", "simulator", "--clients", "5", "--rounds", "1"]
    for option in ("attack=scaled", "attacker_share=0.2", "rule=trimmed-mean", "attackers=1", "max_steps=1"):
        arguments += ["--set", option]
    cached = ["--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, [*arguments, *cached], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    row = json.loads(result.output)
    assert "attack=scaled attacker_share=0.2" in row["options"]
    (rounds,) = [f for f in (tmp_path / "out").iterdir() if f.suffix == ".jsonl"]
    (one,) = [json.loads(line) for line in rounds.read_text().splitlines()]
    assert len(one["suspects"]) == 1
