"""Strategies: the plan equals its reference in torch, and the identities that the papers promise."""

from collections.abc import Callable

import numpy as np
import pytest
from oracles.compiled import compiled_plan
from oracles.plan_runner import run_plan
from oracles.small_federation import arrays, model, splits
from wearfleet_cloud.federated import STRATEGIES, create_strategy
from wearfleet_cloud.federated.aggregate import Contribution
from wearfleet_cloud.federated.base import AveragingStrategy
from wearfleet_cloud.federated.reference_client import ClientResult, run_client
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole

SEED, ROUND = 7, 3
FEDAVG_ON_CLIENTS = ("fedadagrad", "fedadam", "fedavgm", "fedyogi")


def reference(
    name: str,
    options: dict[str, object],
    downloaded: dict[str, np.ndarray],
    client: int = 1,
    **persisted: np.ndarray,
) -> ClientResult:
    strategy = create_strategy(name, {"batch_size": 16, **options})
    return run_client(
        strategy, model("cnn"), downloaded, persisted, splits(client), seed=SEED, round_number=ROUND
    )


def contribution(name: str, result: ClientResult) -> Contribution:
    return Contribution(name, result.num_examples, lambda: result.update)


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        *(
            pytest.param(
                name,
                "transformer" if name == "epfl" else "cnn",
                marks=pytest.mark.slow if name in FEDAVG_ON_CLIENTS else (),
            )
            for name in STRATEGIES
        ),
        ("fedavg", "transformer"),
        pytest.param("fedprox", "transformer", marks=pytest.mark.slow),
    ],
)
def test_a_round_of_the_plan_is_a_round_of_the_reference(name: str, backbone: str) -> None:
    options = {"batch_size": 16, "epochs": 2, **({} if name == "scaffold" else {"momentum": 0.9})}
    if name == "fedhealth2":
        options["weight_source"] = "warmup"  # its own needs a reference network
    strategy = create_strategy(name, options)
    network = strategy.network(model(backbone), seed=0)
    plan, graphs = compiled_plan(strategy, network, seed=SEED)
    generator = np.random.default_rng(5)
    downloaded = {s.name: generator.normal(0, 0.01, s.shape).astype(s.dtype) for s in plan.download_specs()}
    downloaded |= arrays(network)
    downloaded |= {f"teacher/{n}": a for n, a in arrays(network).items() if f"teacher/{n}" in downloaded}
    if name == "metafed-site":  # the rounds of a turn in which devices train
        downloaded["trains"] = np.ones_like(downloaded["trains"])
    persisted = {n: a + np.asarray(0.25, a.dtype) for n, a in downloaded.items() if "norm1" in n}
    expected = run_client(strategy, network, downloaded, persisted, splits(1), seed=SEED, round_number=ROUND)
    state, update, metrics = run_plan(plan, graphs, downloaded, persisted, splits(1), round_number=ROUND)
    assert update.keys() == expected.update.keys()
    for tensor, array in expected.state.items():
        # a control is (x - y) / (K rate), and so is the rounding of y; K is 6, the rate 0.01
        least = 1e-3 / 0.06 if "control" in tensor else 1e-3
        error = np.linalg.norm(state[tensor] - array) / max(float(np.linalg.norm(array)), least)
        assert error < 2e-5, tensor
    assert metrics.keys() == expected.metrics.keys()
    for metric, value in expected.metrics.items():
        assert metrics[metric] == pytest.approx(value, rel=1e-4), metric
    assert metrics["evaluate_before/count"] == metrics["evaluate_after/count"] == 21
    trained = [value for metric, value in metrics.items() if metric.startswith("train") and "count" in metric]
    # D' of 32 and of 13 windows; four of five windows
    per_epoch = {"perfedavg": 16 + 6, "metafed": 36, "metafed-site": 36}.get(name, 45)
    if name != "zoopfl":  # which counts nothing while it builds its auto-encoder
        assert 2 * per_epoch in trained, "a window was left out or came twice"


def test_fedprox_without_pull_is_fedavg_exactly() -> None:
    network = model("cnn")
    avg_plan, avg_graphs = compiled_plan(create_strategy("fedavg", {}), network)
    prox_plan, prox_graphs = compiled_plan(create_strategy("fedprox", {"mu": 0.0}), network)
    start = arrays(network)
    _, avg, _ = run_plan(avg_plan, avg_graphs, start, {}, splits(1), round_number=ROUND)
    _, prox, _ = run_plan(prox_plan, prox_graphs, start, {}, splits(1), round_number=ROUND)
    for name, update in avg.items():
        np.testing.assert_array_equal(prox[name], update)


def test_a_stronger_pull_stays_nearer_to_the_global_model() -> None:
    start = arrays(model("cnn"))

    def distance(mu: float) -> float:
        update = reference("fedprox", {"mu": mu, "epochs": 4, "learning_rate": 0.05}, start).update
        return float(np.sqrt(sum(np.sum(u**2) for n, u in update.items() if n.endswith(("weight", "bias")))))

    assert distance(5.0) < 0.7 * distance(0.1) < distance(0.0)


def test_one_client_makes_its_own_model_the_global_one() -> None:
    start = arrays(model("cnn"))
    strategy = create_strategy("fedavg", {"batch_size": 16})
    result = reference("fedavg", {}, start)
    specs = strategy.client(model("cnn")).tensors
    averaged = strategy.server(specs, start, {}, [contribution("only", result)])
    for name in start:
        np.testing.assert_allclose(averaged.tensors[name], result.state[name], rtol=1e-6, atol=1e-7)
        assert averaged.tensors[name].dtype == start[name].dtype


def test_three_rounds_of_fedavg_learn() -> None:
    current = arrays(model("cnn"))
    strategy = create_strategy(
        "fedavg", {"batch_size": 16, "learning_rate": 0.05, "momentum": 0.9, "epochs": 2}
    )
    specs = strategy.client(model("cnn")).tensors
    accuracies = []
    for round_number in range(1, 4):
        results = [
            run_client(
                strategy, model("cnn"), current, {}, splits(client, 90), seed=SEED, round_number=round_number
            )
            for client in range(3)
        ]
        hits = sum(r.metrics["evaluate_before/correct"] for r in results)
        accuracies.append(hits / sum(r.metrics["evaluate_before/count"] for r in results))
        current = strategy.server(
            specs, current, {}, [contribution(str(i), r) for i, r in enumerate(results)]
        ).tensors
    assert accuracies[2] > accuracies[0] + 0.2


def test_fedbn_uploads_no_normalisation_and_starts_from_its_own() -> None:
    network = model("cnn")
    start = arrays(network)
    strategy = create_strategy("fedbn", {"batch_size": 16})
    roles = {s.name: s.role for s in strategy.client(network).tensors}
    result = reference("fedbn", {}, start)
    assert {roles[name] for name in result.update} == {TensorRole.SHARED, TensorRole.HEAD}
    own = {n: result.state[n] for n, r in roles.items() if r in strategy.info.kept_local}
    again = reference("fedbn", {"learning_rate": 1e-9}, start, **own)
    np.testing.assert_allclose(again.state["backbone.norm1.weight"], own["backbone.norm1.weight"], atol=1e-6)
    assert not np.allclose(own["backbone.norm1.weight"], start["backbone.norm1.weight"], atol=1e-4)


def test_fedbn_leaves_the_global_normalisation_alone() -> None:
    start = arrays(model("cnn"))
    strategy = create_strategy("fedbn", {"batch_size": 16})
    specs = strategy.client(model("cnn")).tensors
    averaged = strategy.server(specs, start, {}, [contribution("a", reference("fedbn", {}, start))])
    changed = {n for n in start if not np.array_equal(averaged.tensors[n], start[n])}
    by_role = {s.name: s.role for s in specs}
    assert {by_role[n] for n in changed} == {TensorRole.SHARED, TensorRole.HEAD}


def test_fedbn_refuses_a_model_without_batch_norm() -> None:
    with pytest.raises(ConfigError, match="needs a model with batch normalisation"):
        compiled_plan(create_strategy("fedbn", {}), model("transformer"))


def test_frozen_standardisation_is_neither_trained_nor_uploaded() -> None:
    start = arrays(model("cnn"))
    result = reference("fedavg", {}, start)
    for name in ("standardise.mean", "standardise.std"):
        np.testing.assert_array_equal(result.state[name], start[name])
        assert name not in result.update


REFUSED: dict[str, Callable[[], object]] = {
    "unknown strategy": lambda: create_strategy("fedsgd", {}),
    "unknown option": lambda: create_strategy("fedavg", {"mu": 0.1}),
    "unknown optimiser": lambda: create_strategy("fedavg", {"optimiser": "lion"}),
    "not a number": lambda: create_strategy("fedprox", {"mu": "strong"}),
    "negative mu": lambda: create_strategy("fedprox", {"mu": -1}),
    "learning rate of zero": lambda: create_strategy("fedavg", {"learning_rate": 0}),
    "momentum with adam": lambda: create_strategy("fedavg", {"optimiser": "adam", "momentum": 0.9}),
    "momentum of one": lambda: create_strategy("fedavg", {"momentum": 1}),
    "empty batch": lambda: create_strategy("fedavg", {"batch_size": 0}),
    "nested options from outside": lambda: create_strategy("fedavg", {"local": "x"}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_options_are_refused(what: str) -> None:
    with pytest.raises(ConfigError):
        REFUSED[what]()


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_strategy_decides_itself_is_in_its_info(name: str) -> None:
    strategy = STRATEGIES[name]
    assert strategy.info.own_downlinks == (strategy.received is not AveragingStrategy.received)
    assert strategy.info.names_cohort == (strategy.cohort is not AveragingStrategy.cohort)
