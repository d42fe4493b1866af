"""Server optimisers: the oracle's numbers, what they leave alone, order, identities, refusals."""

import itertools

import numpy as np
import pytest
from oracles.server_optimisers import Oracle
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Arrays, Contribution
from wearfleet_cloud.federated.base import Strategy
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, decode_tensors, encode_tensors

OPTIMISERS = ("fedadagrad", "fedadam", "fedavgm", "fedyogi")
SIZE = 5
SPECS = (
    TensorSpec("w", "float32", (SIZE,), TensorRole.SHARED, TensorGroup.PARAM),
    TensorSpec("gamma", "float32", (SIZE,), TensorRole.NORM_AFFINE, TensorGroup.PARAM),
    TensorSpec("head", "float32", (SIZE,), TensorRole.HEAD, TensorGroup.PARAM),
    TensorSpec("frozen", "float32", (SIZE,), TensorRole.FROZEN, TensorGroup.BUFFER),
    TensorSpec("mean", "float32", (SIZE,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
    TensorSpec("variance", "float32", (SIZE,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
    TensorSpec("count", "int64", (), TensorRole.COUNTER, TensorGroup.BUFFER),
)
OPTIMISED = ("w", "gamma", "head")
CASES = {
    "fedadagrad": {"server_learning_rate": 0.2, "beta1": 0.3, "tau": 0.01},
    "fedadam": {"server_learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 0.001},
    "fedadam corrected": {
        "server_learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 0.001, "bias_correction": "on"
    },
    "fedavgm": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "fedyogi": {"server_learning_rate": 0.1, "beta1": 0.9, "beta2": 0.9, "tau": 0.05},
    "fedyogi corrected": {
        "server_learning_rate": 0.1, "beta1": 0.9, "beta2": 0.9, "tau": 0.05, "bias_correction": "on"
    },
}  # fmt: skip


def start() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    tensors = {
        s.name: generator.normal(size=s.shape).astype(np.float32) for s in SPECS if s.dtype == "float32"
    }
    return {**tensors, "variance": np.ones(SIZE, np.float32), "count": np.asarray(4, np.int64)}


def differences(number: int, seed: int) -> list[Contribution]:
    """Updates of some clients, of sizes around the squares of tau so that Yogi's sign takes both values."""
    generator = np.random.default_rng(seed)

    def one(client: int) -> Contribution:
        update: dict[str, np.ndarray] = {
            s.name: (generator.normal(size=s.shape) * 0.1).astype(np.float32)
            for s in SPECS
            if s.dtype == "float32" and s.role != TensorRole.FROZEN
        }
        update["count"] = np.asarray(client, np.int64)
        return Contribution(f"client-{client}", int(generator.integers(1, 50)), lambda: update)

    return [one(client) for client in range(number)]


def rounds(strategy: Strategy, number: int = 4) -> tuple[Arrays, Arrays]:
    tensors, state = start(), {}
    for seed in range(number):
        folded = strategy.server(SPECS, tensors, state, differences(3, seed))
        tensors, state = folded.tensors, folded.state
    return tensors, state


@pytest.mark.parametrize("case", CASES)
def test_four_rounds_are_those_of_the_oracle(case: str) -> None:
    name = case.split(maxsplit=1)[0]
    tensors, state = start(), {}
    strategy = create_strategy(name, CASES[case])
    oracles = {n: Oracle(name, tensors[n].astype(float).tolist(), CASES[case]) for n in OPTIMISED}
    for seed in range(4):
        updates = differences(3, seed)
        folded = strategy.server(SPECS, tensors, state, updates)
        tensors, state = folded.tensors, folded.state
        for n, oracle in oracles.items():
            expected = oracle.aggregate(
                [(c.num_examples, c.load()[n].astype(float).tolist()) for c in updates]
            )
            # one rounding to float32 a round, 2^-24 relative each; float64 in between
            np.testing.assert_allclose(tensors[n], expected, rtol=8 * 2**-24, atol=8 * 2**-24)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_statistics_and_counters_are_those_of_fedavg(name: str) -> None:
    plain = create_strategy("fedavg", {}).server(SPECS, start(), {}, differences(3, 0)).tensors
    folded = create_strategy(name, {}).server(SPECS, start(), {}, differences(3, 0))
    for untouched in ("frozen", "mean", "variance", "count"):
        np.testing.assert_array_equal(folded.tensors[untouched], plain[untouched])
        assert not any(key.endswith(f"/{untouched}") for key in folded.state)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_arrival_order_changes_not_one_bit_of_tensors_or_state(name: str) -> None:
    strategy = create_strategy(name, {})
    _, state = rounds(strategy, 2)
    results = [
        strategy.server(SPECS, start(), state, order) for order in itertools.permutations(differences(3, 9))
    ]
    for result in results[1:]:
        assert encode_tensors(result.tensors) == encode_tensors(results[0].tensors)
        assert encode_tensors(result.state) == encode_tensors(results[0].state)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_state_that_was_written_and_read_back_goes_on_bit_for_bit(name: str) -> None:
    strategy = create_strategy(name, {})
    tensors, state = rounds(strategy, 3)
    stored = decode_tensors(encode_tensors(state))
    gone_on = strategy.server(SPECS, tensors, state, differences(3, 3))
    resumed = strategy.server(SPECS, tensors, stored, differences(3, 3))
    assert encode_tensors(resumed.tensors) == encode_tensors(gone_on.tensors)
    assert encode_tensors(resumed.state) == encode_tensors(gone_on.state)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_no_update_is_no_step_and_leaves_the_state(name: str) -> None:
    strategy = create_strategy(name, {})
    tensors, state = rounds(strategy, 2)
    before = encode_tensors(state)
    with pytest.raises(AggregationError, match="no updates"):
        strategy.server(SPECS, tensors, state, [])
    assert encode_tensors(state) == before
    assert state["aggregations"] == 2


def test_fedavgm_without_momentum_is_fedavg() -> None:
    plain = create_strategy("fedavg", {}).server(SPECS, start(), {}, differences(4, 1)).tensors
    moved = create_strategy("fedavgm", {"server_momentum": 0.0}).server(SPECS, start(), {}, differences(4, 1))
    for name, array in plain.items():
        np.testing.assert_array_equal(moved.tensors[name], array)


@pytest.mark.parametrize("name", ["fedadam", "fedadagrad", "fedyogi"])
def test_without_first_moment_and_with_a_large_tau_the_step_is_a_multiple_of_fedavgs(name: str) -> None:
    """x + rate d / (sqrt(tau^2 + ...) + tau) is x + d where rate = 2 tau and tau is far above every |d|."""
    options = {"beta1": 0.0, "tau": 1e4, "server_learning_rate": 2e4}
    if name != "fedadagrad":
        options["beta2"] = 1.0 - 1e-12
    plain = create_strategy("fedavg", {}).server(SPECS, start(), {}, differences(4, 1)).tensors
    folded = create_strategy(name, options).server(SPECS, start(), {}, differences(4, 1)).tensors
    for tensor in OPTIMISED:
        # sqrt(tau^2 + d^2) differs from tau by (d / tau)^2 / 2 < 1e-9 relative: below one float32 rounding
        np.testing.assert_allclose(folded[tensor], plain[tensor], rtol=2**-23, atol=2**-23)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedadam", {"beta1": 1.0}),
        ("fedadam", {"beta2": -0.1}),
        ("fedadam", {"tau": 0}),
        ("fedyogi", {"server_learning_rate": 0}),
        ("fedyogi", {"bias_correction": "maybe"}),
        ("fedadagrad", {"tau": "inf"}),
        ("fedadagrad", {"beta2": 0.9}),
        ("fedavgm", {"server_momentum": 1.0}),
        ("fedavgm", {"server_learning_rate": -1}),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        create_strategy(name, options)
