"""EPFL with ranks that clients choose: the oracle's rounds, what a rank hides, equal ranks, runners, refusals."""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles.compiled import compiled_plan
from oracles.edge_rounds import SEED, Federation
from oracles.small_federation import arrays, model, splits
from oracles.torch_clients import batches_of, descend, gradients, loaded
from wearfleet_cloud.cli.simulate import device_engine
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Averaged, Contribution
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.factor_masks import HELD
from wearfleet_cloud.federated.factor_ranks import RANK, column_distances, mixed_rows, rank_fault
from wearfleet_cloud.federated.reference_client import ClientResult, run_client
from wearfleet_cloud.federated.simulate import Outcome, Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient, with_ranks
from wearfleet_cloud.federated.stacked_clients import Runner, StackedClients
from wearfleet_cloud.federated.wire_clients import WireClients
from wearfleet_models.classifier import derived
from wearfleet_models.roles import tensor_roles
from wearfleet_protos.errors import AggregationError, ConfigError, ShapeError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

Arrays = dict[str, np.ndarray]

R = 4
RANKS = {"anna": 4, "ben": 2, "cleo": 3}
CLIENTS = {"anna": splits(1), "ben": splits(2, 32), "cleo": splits(3, 20)}
OPTIONS = {"batch_size": 16, "learning_rate": 0.05, "own_weight": 0.4, "rank": R}
STRATEGY = create_strategy("epfl", OPTIONS)
NETWORK = STRATEGY.network(model("transformer"), SEED)
ROLES = tensor_roles(NETWORK)
A, B, HEAD = (
    [n for n, r in ROLES.items() if r == role]
    for role in (TensorRole.LORA_A, TensorRole.LORA_B, TensorRole.HEAD)
)
torch.manual_seed(SEED)
for factor in B:  # as after some training: from B = 0 hardly anything moves A
    torch.nn.init.normal_(NETWORK.get_parameter(factor), 0.0, 0.3)
FIRST = arrays(NETWORK)
COHORTS = (("anna", "ben", "cleo"), ("anna", "ben"), ("ben", "cleo"))
"""In the second round cleo is absent, in the third anna, who alone has row 3."""


@pytest.fixture(scope="module")
def untouched() -> Federation:
    return Federation(STRATEGY, NETWORK, CLIENTS)


def after_rounds(untouched: Federation, ranks: Mapping[str, int]) -> Federation:
    """The rounds of ``COHORTS`` by one plan, which takes longer to build than they do."""
    made = copy(untouched)
    made.local, made.ranks = {}, dict(ranks)
    for members in COHORTS:
        made.round(members)
    return made


@pytest.fixture(scope="module")
def federation(untouched: Federation) -> Federation:
    return after_rounds(untouched, RANKS)


def trained(start: Arrays, name: str, number: int) -> Arrays:
    """SGD in which whatever is beyond the client's rank has no gradient, and no part in B A."""
    network, rank = loaded(derived(NETWORK), start).eval(), RANKS[name]
    factors = dict(network.named_parameters())
    with torch.no_grad():
        for tensor in B:
            factors[tensor][:, rank:] = 0.0
    for batch in batches_of(CLIENTS[name]["train"], 16, 1, seed=SEED, round_number=number):
        found = gradients(network, batch)
        for tensor in A:
            found[tensor][rank:] = 0.0
        for tensor in B:
            found[tensor][:, rank:] = 0.0
        descend(network, 0.05, {n: found[n] for n in (*A, *B, *HEAD)})
    return arrays(network)


def distance(one: Arrays, other: Arrays, common: int) -> float:
    """Mean over layers of the root of R / c times the sum over c columns, number by number."""
    layers = []
    for tensor in B:
        columns = [
            ((one[tensor][:, k] - other[tensor][:, k]).astype(float) ** 2).sum() for k in range(common)
        ]
        layers.append(np.sqrt(R / common * sum(columns)))
    return float(np.mean(layers))


def mixture(i: str, last: Mapping[str, Arrays], tensor: str) -> np.ndarray:
    """Row by row over the clients that have it."""
    near = {j: 1 / distance(last[i], last[j], min(RANKS[i], RANKS[j])) for j in last if j != i}
    weights = {i: 0.4, **{j: 0.6 * a / sum(near.values()) for j, a in near.items()}}
    rows = []
    for k in range(R):
        having = [j for j in last if RANKS[j] > k]
        total = sum(weights[j] for j in having)
        rows.append(sum(weights[j] / total * last[j][tensor][k].astype(float) for j in having))
    return np.array(rows, np.float32)


def oracle() -> tuple[dict[str, Arrays], dict[str, Arrays], Arrays]:
    """What each client receives next, what it keeps, and the global factors A."""
    common = {n: array.copy() for n, array in FIRST.items()}
    own, kept, last = dict[str, Arrays](), dict[str, Arrays](), dict[str, Arrays]()
    for number, members in enumerate(COHORTS, start=1):
        for name in members:
            last[name] = trained({**common, **own.get(name, {}), **kept.get(name, {})}, name, number)
            kept[name] = {n: last[name][n] for n in (*B, *HEAD)}
        for tensor in A:
            for k in range(R):
                having = [last[j][tensor][k].astype(float) for j in members if RANKS[j] > k]
                if having:
                    common[tensor][k] = np.mean(having, axis=0)
        own = {i: {tensor: mixture(i, last, tensor) for tensor in A} for i in last}
    return own, kept, {n: common[n] for n in A}


def test_rounds_of_unequal_ranks_on_the_device_are_those_of_the_oracle(federation: Federation) -> None:
    own, kept, common = oracle()
    # errors are measured against how far a row moved, so that wrong weights show: factors A move by 2e-3 of their norm
    # or more, in 9 steps and 3 mixtures that each round them to 2^-24, which is sqrt(12) 2^-24 / 2e-3 = 1e-4
    for name in CLIENTS:
        received = STRATEGY.received(name, federation.tensors, federation.state)
        for tensor, array in own[name].items():
            moved = np.linalg.norm(array - FIRST[tensor], axis=1)
            assert (np.linalg.norm(received[tensor] - array, axis=1) < 2e-4 * moved).all(), (name, tensor)
        for tensor, array in kept[name].items():
            error = np.linalg.norm(federation.local[name][tensor] - array) / np.linalg.norm(array)
            assert error < 2e-5, (name, tensor)  # 9 steps over 64 numbers and 16 windows: 9 sqrt(1024) 2^-24
    for tensor, array in common.items():
        error = np.linalg.norm(federation.tensors[tensor] - array)
        assert error < 2e-4 * np.linalg.norm(array - FIRST[tensor]), tensor


def test_what_is_beyond_the_rank_is_sent_as_zeros_and_kept_as_zeros(federation: Federation) -> None:
    for name, rank in RANKS.items():
        result, update = federation.client(name)
        assert float(update[RANK]) == rank
        assert result.state[HELD].tolist() == [1.0] * rank + [0.0] * (R - rank)
        for tensor in A:
            assert not update[tensor][rank:].any(), tensor
            assert (np.linalg.norm(update[tensor][:rank], axis=1) > 0).all(), tensor
        for tensor in B:
            assert not result.state[tensor][:, rank:].any(), tensor
            assert (np.linalg.norm(result.state[tensor][:, :rank], axis=0) > 0).all(), tensor
        for layer, tensor in enumerate(B):
            np.testing.assert_array_equal(update[f"sketch/{layer}"], result.state[tensor].T)


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9, "weight_decay": 0.1}, {"optimiser": "adam", "weight_decay": 0.1}]
)
def test_no_optimiser_moves_what_is_beyond_the_rank(options: dict[str, object]) -> None:
    strategy = create_strategy("epfl", {**OPTIONS, **options, "epochs": 2})
    result = one_round(strategy, FIRST, {}, rank=2)
    for tensor in A:
        np.testing.assert_array_equal(result.state[tensor][2:], FIRST[tensor][2:])
        assert (result.state[tensor][:2] != FIRST[tensor][:2]).all()
    assert all(not result.state[tensor][:, 2:].any() for tensor in B)


def one_round(strategy: Strategy, received: Arrays, kept: Arrays, *, rank: int) -> ClientResult:
    return run_client(
        strategy, NETWORK, received, kept, CLIENTS["anna"], seed=SEED, round_number=1, max_lora_rank=rank
    )


def test_a_device_that_lowers_its_rank_forgets_columns_and_one_that_raises_it_receives_rows(
    federation: Federation,
) -> None:
    generator = np.random.default_rng(3)
    kept = {n: generator.normal(0, 0.3, FIRST[n].shape).astype(np.float32) for n in B}
    without = {n: np.where(np.arange(R) < 2, array, 0).astype(np.float32) for n, array in kept.items()}
    expected = measured_before(one_round(STRATEGY, FIRST, without, rank=R))
    for beyond in (kept, without):
        result = one_round(STRATEGY, FIRST, beyond, rank=2)
        assert all(not result.state[n][:, 2:].any() for n in B)
        assert measured_before(result) == expected
    ben = STRATEGY.received("ben", federation.tensors, federation.state)
    anna = STRATEGY.received("anna", federation.tensors, federation.state)
    for tensor in A:  # row 3 is anna's alone, to the bit
        np.testing.assert_array_equal(ben[tensor][3], anna[tensor][3])


def measured_before(result: ClientResult) -> dict[str, float]:
    return {n: value for n, value in result.metrics.items() if n.startswith("evaluate_before")}


@pytest.mark.slow
def test_equal_ranks_are_epfl_without_limits_to_the_bit(untouched: Federation) -> None:
    unlimited = after_rounds(untouched, {})
    for limit in (R, R + 5):
        limited = after_rounds(untouched, dict.fromkeys(CLIENTS, limit))
        for one, other in ((limited.tensors, unlimited.tensors), (limited.state, unlimited.state)):
            assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in other.items()}
        for name, own in unlimited.local.items():
            assert all(np.array_equal(limited.local[name][n], array) for n, array in own.items())


def test_columns_that_differ_alike_make_the_same_distance_however_many_are_common() -> None:
    layer = np.stack([np.full((8, 16), value) for value in (0.0, 0.25)])
    for common in (1, 3, 8):
        (near, apart), _ = column_distances([layer, 2 * layer], np.array([common, 8]))
        assert near == 0.0
        # d = mean(1, 2) sqrt(8 * 16) / 4; two roundings each of a product, a sum of 8 terms and a root
        assert apart == pytest.approx(1.5 * np.sqrt(8 * 16) / 4, rel=16 * 2**-53)


def test_a_row_that_nobody_with_a_weight_has_stays_the_clients_own() -> None:
    last = {"a": np.array([[0.0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])[:, :, None]}
    weights = np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]])  # the third is stale for the others
    found = mixed_rows(weights, last, np.array([1, 2, 3]))["a"][:, :, 0]
    # row 1 is the second one's, row 2 only the stale one has, row 3 nobody; exact but for weights of a third
    expected = [[2, 5, 2, 3], [2, 5, 6, 7], [5, (5 + 2 * 9) / 3, 10, 11]]
    np.testing.assert_allclose(found, expected, rtol=4 * 2**-53)


def outcome(clients: tuple[SimulatedClient, ...], runner: Runner) -> Outcome:
    return simulate(STRATEGY, NETWORK, Population(clients), Simulation(2, seed=SEED), lambda _: runner)


@pytest.mark.slow
def test_runners_agree_on_clients_of_unequal_ranks() -> None:
    clients = with_ranks([SimulatedClient(n, s["train"], s["holdout"]) for n, s in CLIENTS.items()], (4, 2))
    assert [client.max_lora_rank for client in clients] == [4, 2, 4]
    runners = [StackedClients(STRATEGY, NETWORK, SEED, at_once=at_once) for at_once in (3, 1)]
    made = [outcome(clients, runner) for runner in runners]
    made.append(outcome(clients, WireClients(*compiled_plan(STRATEGY, NETWORK, seed=SEED), device_engine)))
    for found in made:
        assert found.state[f"feature/{RANK}"].tolist() == [4.0, 2.0, 4.0]
        for name in CLIENTS:
            one, other = (STRATEGY.received(name, m.tensors, m.state) for m in (found, made[-1]))
            for tensor in A:  # as for the oracle
                moved = np.linalg.norm(other[tensor] - FIRST[tensor])
                assert np.linalg.norm(one[tensor] - other[tensor]) < 2e-4 * moved, (name, tensor)


def test_a_rank_that_is_none_is_refused() -> None:
    assert [rank_fault(rank, 8) for rank in (1.0, 8.0)] == ["", ""]
    for rank in (0.0, 9.0, 2.5):
        assert f"its rank is {rank:g}, expected" in rank_fault(rank, 8)
    with pytest.raises(ConfigError, match="max_lora_rank of anna"):
        with_ranks([SimulatedClient("anna", **CLIENTS["anna"])], (0,))
    mask = TensorSpec("h", "float32", (4,), TensorRole.LORA_RANK, TensorGroup.AUX, "ones")
    for changes in ({"shape": ()}, {"origin": "zeros"}):
        with pytest.raises(ShapeError, match="LORA_RANK needs one dimension and origin 'ones'"):
            replace(mask, **changes)


def test_a_client_whose_rank_is_none_is_left_out_and_named() -> None:
    federation = Federation(STRATEGY, NETWORK, CLIENTS)
    generator = np.random.default_rng(1)
    sent = {
        name: {s.name: generator.normal(size=s.shape).astype(s.dtype) for s in federation.plan.upload_specs()}
        | {RANK: np.asarray(rank, np.float32)}
        for name, rank in (("anna", 4.0), ("ben", 5.0), ("cleo", 2.0))
    }

    def folded(*names: str) -> Averaged:
        parts = [Contribution(name, 10, lambda name=name: sent[name], 1) for name in names]
        return STRATEGY.server(federation.plan.tensors, federation.tensors, {}, parts)

    found, without = folded("anna", "ben", "cleo"), folded("anna", "cleo")
    assert [(j.client, j.verdict) for j in found.mean.evidence] == [("ben", "refused")]
    for name, array in without.tensors.items():
        assert np.array_equal(found.tensors[name], array), name
    assert found.state["clients"].tobytes() == b"anna\ncleo"
    with pytest.raises(AggregationError, match="its rank is 5"):
        folded("ben")


def test_ranks_for_a_strategy_without_them_are_refused() -> None:
    clients = with_ranks([SimulatedClient(n, **s) for n, s in CLIENTS.items()], (2,))
    fedavg = create_strategy("fedavg", {})
    with pytest.raises(ConfigError, match="fedavg has no low-rank factors"):
        simulate(
            fedavg,
            NETWORK,
            Population(clients),
            Simulation(1),
            lambda s: StackedClients(s, NETWORK, SEED),
        )
