"""FedNova: the oracle's numbers, the length of each solver, FedAvg for equal steps, refusals."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.fednova import aggregate
from oracles.fednova import solver_length as obvious_length
from oracles.small_federation import arrays, model, splits
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Contribution
from wearfleet_cloud.federated.fednova import solver_length
from wearfleet_cloud.federated.reference_client import run_client
from wearfleet_cloud.federated.training_options import LocalTraining
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, encode_tensors

SPECS = (
    TensorSpec("w", "float32", (4,), TensorRole.SHARED, TensorGroup.PARAM),
    TensorSpec("mean", "float32", (4,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
    TensorSpec("variance", "float32", (4,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
)
START = {s.name: np.ones(4, np.float32) for s in SPECS}
SOLVERS: dict[str, dict[str, float]] = {"sgd": {}, "momentum": {"momentum": 0.9}, "proximal": {"mu": 0.5}}


def contributions(steps: list[int], seed: int = 0) -> list[Contribution]:
    generator = np.random.default_rng(seed)

    def one(client: int, count: int) -> Contribution:
        update = {s.name: (0.1 * generator.normal(size=4)).astype(np.float32) for s in SPECS}
        return Contribution(f"c{client}", int(generator.integers(1, 40)), lambda: update, count)

    return [one(client, count) for client, count in enumerate(steps)]


@given(
    steps=st.integers(1, 60), momentum=st.sampled_from([0.0, 0.5, 0.9]), mu=st.sampled_from([0.0, 0.01, 3.0])
)
def test_the_length_of_a_solver_is_how_far_it_goes_on_a_constant_gradient(
    steps: int, momentum: float, mu: float
) -> None:
    momentum = 0.0 if mu else momentum
    local = LocalTraining(learning_rate=0.05, momentum=momentum)
    expected = obvious_length(steps, 0.05, momentum, mu)
    # 1 - (1 - 5e-4)^K loses up to 4 digits of float64's 16
    assert solver_length(steps, local, mu) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_fold_is_that_of_the_oracle(solver: str) -> None:
    options = {"learning_rate": 0.05, **SOLVERS[solver]}
    updates = contributions([1, 7, 0, 30])
    folded = create_strategy("fednova", options).server(SPECS, START, {}, updates)
    x = START["w"].astype(float).tolist()
    clients = [
        (c.num_examples, c.num_steps, (START["w"] + c.load()["w"].astype(float)).tolist()) for c in updates
    ]
    expected = aggregate(x, clients, 0.05, options.get("momentum", 0.0), options.get("mu", 0.0))
    np.testing.assert_allclose(folded.tensors["w"], expected, rtol=2**-22)  # one rounding to float32
    assert folded.mean.clients == ("c0", "c1", "c3")


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_steps_are_fedavg(solver: str) -> None:
    updates = contributions([5, 5, 5])
    plain = create_strategy("fedavg", {}).server(SPECS, START, {}, updates)
    folded = create_strategy("fednova", SOLVERS[solver]).server(SPECS, START, {}, updates)
    for name, array in plain.tensors.items():  # tau_eff / a is 1 but for a rounding of float64
        np.testing.assert_allclose(folded.tensors[name], array, rtol=2**-23)


def test_statistics_are_pooled_whatever_the_steps() -> None:
    few, many = (
        create_strategy("fednova", {}).server(SPECS, START, {}, contributions(s)) for s in ([1, 9], [5, 5])
    )
    for name in ("mean", "variance"):
        np.testing.assert_array_equal(few.tensors[name], many.tensors[name])
    assert not np.array_equal(few.tensors["w"], many.tensors["w"])


def test_arrival_order_changes_not_one_bit() -> None:
    strategy = create_strategy("fednova", {"momentum": 0.9})
    orders = itertools.permutations(contributions([2, 3, 17]))
    assert len({encode_tensors(strategy.server(SPECS, START, {}, order).tensors) for order in orders}) == 1


def test_a_client_that_stops_early_pulls_as_much_as_its_windows_say() -> None:
    """Two clients, one with twice the windows and steps: FedNova is the mean of directions, FedAvg is not."""
    start, windows = arrays(model("cnn")), {"short": splits(1, 16), "long": splits(2, 32)}
    options = {"batch_size": 16, "epochs": 3, "learning_rate": 0.05}
    strategy = create_strategy("fednova", options)
    results = {
        n: run_client(strategy, model("cnn"), start, {}, w, seed=1, round_number=1)
        for n, w in windows.items()
    }
    updates = [
        Contribution(n, r.num_examples, lambda r=r: r.update, 3 * r.num_examples // 16)
        for n, r in results.items()
    ]
    specs = strategy.client(model("cnn")).tensors
    folded = strategy.server(specs, start, {}, updates).tensors
    name = "head.weight"
    weight, short, long = 1 / 3, *(results[n].update[name].astype(float) for n in ("short", "long"))
    expected = start[name] + (weight * 3 + (1 - weight) * 6) * (weight * short / 3 + (1 - weight) * long / 6)
    np.testing.assert_allclose(folded[name], expected, rtol=1e-6, atol=1e-8)
    plain = create_strategy("fedavg", options).server(specs, start, {}, updates).tensors
    assert np.abs(folded[name] - plain[name]).max() > 1e-3 * np.abs(plain[name] - start[name]).max()


def test_without_a_step_there_is_nothing_to_fold() -> None:
    with pytest.raises(AggregationError, match="no client made a step"):
        create_strategy("fednova", {}).server(SPECS, START, {}, contributions([0, 0]))
    with pytest.raises(AggregationError, match="twice"):
        create_strategy("fednova", {}).server(SPECS, START, {}, [replace(contributions([1])[0])] * 2)


REFUSED: dict[str, Callable[[], object]] = {
    "adam": lambda: create_strategy("fednova", {"optimiser": "adam"}),
    "momentum and pull": lambda: create_strategy("fednova", {"momentum": 0.9, "mu": 0.1}),
    "negative pull": lambda: create_strategy("fednova", {"mu": -1}),
    "pull beyond the anchor": lambda: create_strategy("fednova", {"mu": 20, "learning_rate": 0.1}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_solvers_without_a_known_length_are_refused(what: str) -> None:
    with pytest.raises(ConfigError):
        REFUSED[what]()
