"""FedAP: rounds on the device's engine equal the oracle's, with absent and new clients; statistics; refusals."""

from functools import partial

import numpy as np
import pytest
import torch
from oracles import fedap as oracle
from oracles.compiled import compiled_plan
from oracles.edge_rounds import SEED, Federation
from oracles.small_federation import arrays, model, splits
from oracles.torch_clients import batches_of, epochs_of_sgd, loaded
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Averaged, Contribution
from wearfleet_cloud.federated.client_models import ClientModels
from wearfleet_cloud.federated.fedap import FedAP
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.tensors import TensorRole

OPTIONS = {"batch_size": 16, "learning_rate": 0.05, "momentum": 0.9, "own_weight": 0.4}
RATES = (0.05, 0.9)
CLIENTS = {"anna": splits(1), "ben": splits(2, 32), "cleo": splits(3, 20)}
NORMS = ("backbone.norm1", "backbone.norm2")
MIXED = (
    "backbone.conv1.weight",
    "backbone.conv1.bias",
    "backbone.conv2.weight",
    "backbone.conv2.bias",
    "head.weight",
    "head.bias",
)
COHORTS = (("anna", "ben"), ("anna", "ben", "cleo"), ("ben", "cleo"), ("anna", "cleo"))
"""Cleo is new in the second round, Anna is away in the third, Ben in the fourth."""


class OracleRounds:
    """The same rounds in plain torch and loops; warm-up of one round."""

    def __init__(self) -> None:
        self.current = arrays(model("cnn"))
        self.own: dict[str, dict[str, np.ndarray]] = {}
        self.local: dict[str, dict[str, np.ndarray]] = {}
        self.last: dict[str, dict[str, np.ndarray]] = {}
        self.moments: dict[str, oracle.Moments] = {}

    def round(self, number: int, members: tuple[str, ...], *, renew: bool) -> None:
        for name in members:
            start = {**self.current, **self.own.get(name, {}), **self.local.get(name, {})}
            network = loaded(model("cnn"), start).train()
            parts = batches_of(CLIENTS[name]["train"], 16, 1, seed=SEED, round_number=number)
            epochs_of_sgd(network, parts, *RATES, [n for n, _ in network.named_parameters()])
            after = arrays(network)
            self.local[name] = {n: a for n, a in after.items() if n.startswith(NORMS)}
            self.last[name] = {n: after[n] for n in MIXED}
            if renew or name not in self.moments:
                self.moments[name] = [(after[f"{n}.running_mean"], after[f"{n}.running_var"]) for n in NORMS]
        uniform = {name: 1.0 / len(members) for name in members}
        self.current = {**self.current, **oracle.mixture(uniform, self.last)}
        self.own = {
            name: oracle.mixture(oracle.weights_of(name, self.moments, 0.4), self.last) for name in self.last
        }


@pytest.mark.slow
@pytest.mark.parametrize("source", ["warmup", "dynamic"])
def test_rounds_on_the_device_are_those_of_the_oracle(source: str) -> None:
    options = {**OPTIONS, "weight_source": source, "warmup_rounds": 1, "every": 2}
    federation, expected = (
        Federation(create_strategy("fedap", options), model("cnn"), CLIENTS),
        OracleRounds(),
    )
    for number, members in enumerate(COHORTS, start=1):
        federation.round(members)
        expected.round(number, members, renew=number == 1 or (source == "dynamic" and number == 3))
    for tensor in MIXED:
        # 4 rounds of at most 3 steps of float32 sums over 16 x 40 terms in another order, 12 sqrt(640) 2^-24 = 2e-5
        pairs = [(federation.tensors, expected.current)]
        for name in CLIENTS:
            got = federation.strategy.received(name, federation.tensors, federation.state)
            pairs.append((got, expected.own[name]))
        for got, wanted in pairs:
            error = np.linalg.norm(got[tensor] - wanted[tensor]) / max(np.linalg.norm(wanted[tensor]), 1e-3)
            assert error < 6e-5, tensor
    for name, tensors in expected.local.items():
        for tensor, array in tensors.items():
            np.testing.assert_allclose(federation.local[name][tensor], array, rtol=1e-3, atol=1e-4)


def test_normalisation_stays_and_every_client_has_a_model_of_its_own() -> None:
    federation = Federation(create_strategy("fedap", {**OPTIONS, "warmup_rounds": 1}), model("cnn"), CLIENTS)
    start = federation.tensors
    assert not {s.role for s in federation.plan.upload_specs()} & set(federation.plan.keep_local)
    assert federation.strategy.received("anna", start, {}) is start
    federation.round()
    models = {n: federation.strategy.received(n, federation.tensors, federation.state) for n in CLIENTS}
    for tensor in start:
        same = np.array_equal(models["anna"][tensor], models["ben"][tensor])
        assert same == (tensor not in MIXED), tensor
    unknown = federation.strategy.received("dora", federation.tensors, federation.state)
    assert unknown is federation.tensors


def reference_strategy(seed: int, monkeypatch: pytest.MonkeyPatch, **options: object) -> FedAP:
    monkeypatch.setattr(FedAP, "_reference", lambda *_: model("cnn", seed))
    known = {"weight_source": "pretrained", "reference": f"network {seed}"}
    made = create_strategy("fedap", {**OPTIONS, **known, **options})
    assert isinstance(made, FedAP)
    return made


def test_pooled_statistics_are_those_of_all_windows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation(reference_strategy(5, monkeypatch), model("cnn"), CLIENTS)
    federation.round()
    features = ClientModels.from_state(federation.state).features
    network, entering = model("cnn", 5).eval(), []
    for norm in (network.backbone.norm1, network.backbone.norm2):
        norm.register_forward_pre_hook(lambda _, given: entering.append(given[0].numpy().astype(np.float64)))
    for row, split in enumerate(CLIENTS.values()):
        entering.clear()
        with torch.no_grad():
            network(torch.from_numpy(split["train"].x))
        assert len(entering) == 2
        for layer, values in enumerate(entering):
            mean, variance = oracle.moments_of(values)
            # float32 sums over 16 x 36 terms in a batch and 3 batches: sqrt(600) 2^-24 = 1.5e-6 of values near 1
            np.testing.assert_allclose(features[f"statistics/{layer}/mean"][row], mean, atol=1e-5)
            np.testing.assert_allclose(features[f"statistics/{layer}/variance"][row], variance, rtol=1e-4)


@pytest.mark.slow
def test_the_reference_travels_in_a_graph_and_not_with_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = compiled_plan(create_strategy("fedap", OPTIONS), model("cnn"))
    with_it, graphs = compiled_plan(reference_strategy(5, monkeypatch), model("cnn"))
    other, _ = compiled_plan(reference_strategy(6, monkeypatch), model("cnn"))
    assert with_it.download_specs() == plain.download_specs()
    assert with_it.upload_specs() == plain.upload_specs()
    (phase,), (phase2,) = ([p for p in plan.phases if p.name == "statistics"] for plan in (with_it, other))
    assert phase.graph != phase2.graph
    assert phase.graph in graphs


def test_with_a_reference_the_first_statistics_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation(reference_strategy(5, monkeypatch), model("cnn"), CLIENTS)
    federation.round(["anna", "ben"])
    before = ClientModels.from_state(federation.state)
    federation.clients = {**CLIENTS, "anna": splits(8)}
    federation.round()
    after = ClientModels.from_state(federation.state)
    for name, array in before.features.items():
        np.testing.assert_array_equal(after.features[name][:2], array)
        assert np.any(after.features[name][2])


def fold(strategy: FedAP, federation: Federation, rounds: list[list[tuple[str, dict[str, np.ndarray], int]]]):
    tensors, state = federation.tensors, {}
    for members in rounds:
        parts = [
            Contribution(name, count, lambda update=update: update, 1) for name, update, count in members
        ]
        folded = strategy.server(federation.plan.tensors, tensors, state, parts)
        tensors, state = folded.tensors, folded.state
    return tensors, state


def updates(federation: Federation, seed: int, *, equal: bool) -> dict[str, np.ndarray]:
    """A client's upload; with equal statistics or its own."""
    generator, common = np.random.default_rng(seed), np.random.default_rng(0)
    return {
        s.name: np.abs(
            (common if equal and s.role == TensorRole.AUX else generator).normal(size=s.shape)
        ).astype(s.dtype)
        for s in federation.plan.upload_specs()
    }


def test_with_equal_distances_and_an_equal_share_it_is_uniform_fedavg() -> None:
    """Section 26: lambda = 1/N and equal distances; what each receives is what FedAvg gives all, round after round."""
    federation = Federation(create_strategy("fedap", OPTIONS), model("cnn"), CLIENTS)
    strategy = create_strategy("fedap", {"own_weight": 1 / 3, "warmup_rounds": 1})
    rounds = [
        [(n, updates(federation, 10 * r + i, equal=True), 9 + i) for i, n in enumerate(CLIENTS)]
        for r in range(3)
    ]
    tensors, state = fold(strategy, federation, rounds)
    expected = {n: federation.tensors[n].astype(np.float64) for n in MIXED}
    for members in rounds:
        expected = {
            n: a + np.mean([update[n] for _, update, _ in members], axis=0) for n, a in expected.items()
        }
    for name in CLIENTS:
        received = strategy.received(name, tensors, state)
        for tensor, array in expected.items():
            # values near 3 are rounded to float32 once a round: 3 x 3 x 2^-24
            np.testing.assert_allclose(received[tensor], array, atol=1e-6)
            np.testing.assert_allclose(tensors[tensor], array, atol=1e-6)


def test_the_order_of_arrival_changes_no_bit_and_names_only_the_order_of_rows() -> None:
    federation = Federation(create_strategy("fedap", OPTIONS), model("cnn"), CLIENTS)
    strategy = create_strategy("fedap", {"warmup_rounds": 1})
    members = [(n, updates(federation, i, equal=False), 10) for i, n in enumerate(CLIENTS)]
    one, other = (fold(strategy, federation, [m, m]) for m in (members, members[::-1]))
    for name, array in one[1].items():
        np.testing.assert_array_equal(other[1][name], array)
    renamed = [
        (new, update, count) for (_, update, count), new in zip(members, ("zoe", "yan", "xia"), strict=True)
    ]
    tensors, state = fold(strategy, federation, [renamed, renamed])
    for (old, _, _), (new, _, _) in zip(members, renamed, strict=True):
        before, after = strategy.received(old, *one), strategy.received(new, tensors, state)
        for tensor in MIXED:  # sums of three in another order
            np.testing.assert_allclose(after[tensor], before[tensor], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stale_rounds", [0, 1])
def test_a_client_that_is_long_absent_counts_no_more(stale_rounds: int) -> None:
    federation = Federation(create_strategy("fedap", OPTIONS), model("cnn"), CLIENTS)
    strategy = create_strategy("fedap", {"warmup_rounds": 1, "stale_rounds": stale_rounds})
    everyone = [(n, updates(federation, i, equal=False), 10) for i, n in enumerate(CLIENTS)]
    _, state = fold(strategy, federation, [everyone, everyone[1:], everyone[1:]])
    weights = strategy.weights(ClientModels.from_state(state))
    assert weights[1:, 0].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-12)
    _, state = fold(strategy, federation, [everyone, everyone[1:]])
    assert (strategy.weights(ClientModels.from_state(state))[1, 0] > 0) == (stale_rounds == 1)
    assert strategy.weights(ClientModels.from_state(state))[0, 0] == strategy.own_weight


def test_windows_count_if_the_operator_wishes() -> None:
    federation = Federation(create_strategy("fedap", OPTIONS), model("cnn"), CLIENTS)
    members = [
        (n, updates(federation, i, equal=True), c)
        for i, (n, c) in enumerate(zip(CLIENTS, (10, 10, 30), strict=True))
    ]
    rows = {}
    for weighting in ("uniform", "examples"):
        strategy = create_strategy("fedap", {"warmup_rounds": 1, "weighting": weighting})
        rows[weighting] = strategy.weights(ClientModels.from_state(fold(strategy, federation, [members])[1]))[
            0
        ]
    np.testing.assert_allclose(rows["uniform"], [0.5, 0.25, 0.25])
    np.testing.assert_allclose(rows["examples"], [0.5, 0.125, 0.375])


@pytest.mark.parametrize("name", ["fedap", "fedhealth2"])
def test_a_client_with_a_negative_variance_is_left_out_and_named(name: str) -> None:
    strategy = create_strategy(name, {"warmup_rounds": 1} if name == "fedap" else {"reference": "none"})
    federation = Federation(create_strategy("fedap", OPTIONS), model("cnn"), CLIENTS)
    specs, good = federation.plan.tensors, [updates(federation, seed, equal=False) for seed in range(4)]
    bad = {**good[3], "statistics/1/variance": -good[3]["statistics/1/variance"]}

    def folded(tensors, state, **sent):
        return strategy.server(
            specs, tensors, state, [Contribution(n, 10, partial(lambda u: u, u), 1) for n, u in sent.items()]
        )

    new = folded(federation.tensors, {}, anna=bad, ben=good[1])
    alone = folded(federation.tensors, {}, ben=good[1])
    (judged,) = new.mean.evidence
    assert (judged.client, judged.verdict, judged.suspect) == ("anna", "refused", True)
    assert "variance among its statistics is negative" in judged.reason
    assert_same(new, alone)
    # one that is known counts with what it sent before
    first = folded(federation.tensors, {}, anna=good[0], ben=good[1])
    known = folded(first.tensors, first.state, anna=bad, ben=good[2])
    assert_same(known, folded(first.tensors, first.state, ben=good[2]))
    with pytest.raises(AggregationError, match="client anna refused"):
        folded(federation.tensors, {}, anna=bad)


def assert_same(one: Averaged, other: Averaged) -> None:
    for mine, theirs in ((one.tensors, other.tensors), (one.state, other.state)):
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_without_batch_normalisation_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch normalisation"):
        compiled_plan(create_strategy("fedap", {}), model("transformer"))


@pytest.mark.parametrize(
    "options",
    [
        {"own_weight": 1.1},
        {"neighbours": -1},
        {"stale_rounds": -1},
        {"weight_source": "guess"},
        {"distance": "cosine"},
        {"warmup_rounds": 0},
        {"every": 0},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        create_strategy("fedap", options)


def test_a_reference_must_be_given_and_see_the_same_windows(tmp_path) -> None:
    with pytest.raises(ConfigError, match="reference=RUN"):
        create_strategy("fedap", {"weight_source": "pretrained"}).client(model("cnn"))
