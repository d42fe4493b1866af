"""MetaFed: turns of a ring on the device's engine against plain torch; who takes part; what is passed on."""

import copy

import numpy as np
import pytest
import torch
from oracles.edge_rounds import SEED, Federation
from oracles.metafed import Ring, ring_of
from oracles.small_federation import model, splits
from oracles.torch_clients import loaded
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Contribution
from wearfleet_cloud.federated.metafed import MetaFed
from wearfleet_protos.errors import AggregationError, ConfigError

SPLITS = {"anna": splits(1, 45, 21), "ben": splits(2, 40, 30), "cleo": splits(3, 50, 9)}
NAMES = tuple(SPLITS)
RATE, BATCH = 0.05, 16


def federation(**options: object) -> Federation:
    settings = {"learning_rate": RATE, "batch_size": BATCH, "warm_rounds": 1, "laps": 1, **options}
    return Federation(create_strategy("metafed", settings), model("cnn"), SPLITS)


def turn(ring: Federation) -> tuple[str, ...]:
    """One round with whoever the strategy chooses."""
    members = ring.strategy.cohort(NAMES, ring.number + 1, ring.state)
    ring.round(members or NAMES)
    return members or NAMES


@pytest.mark.parametrize(
    ("threshold", "share_norm"),
    [
        pytest.param(2.0, "off", id="always copies", marks=pytest.mark.slow),
        pytest.param(2.0, "on", id="copies norms too", marks=pytest.mark.slow),
        pytest.param(0.0, "off", id="always distils", marks=pytest.mark.slow),
        pytest.param(0.45, "off", id="some do, some do not"),
    ],
)
def test_a_whole_run_is_that_of_plain_torch(threshold: float, share_norm: str) -> None:
    ours = federation(threshold=threshold, share_norm=share_norm, personal_threshold=0.2)
    ring = Ring(
        ring_of(model("cnn"), NAMES),
        {name: parts["train"] for name, parts in SPLITS.items()},
        threshold=threshold,
        personal_threshold=0.2,
        strength=1.0,
        share_norm=share_norm == "on",
        rate=RATE,
        batch=BATCH,
        seed=SEED,
    )
    assert turn(ours) == NAMES
    ring.warm()
    teacher = None
    for name in NAMES:
        assert turn(ours) == (name,)
        teacher = ring.turn(name, teacher)
    assert turn(ours) == NAMES
    assert teacher is not None
    passed_on = loaded(model("cnn"), dict(ours.tensors))
    ring.personal(teacher)
    for name, member in ring.members.items():
        assert bool(ours.local[name]["good_enough"]) == member.good
        learned = {n: v for n, v in member.model.state_dict().items() if not n.startswith("standardise")}
        for tensor, value in learned.items():
            # 3 x 3 steps of float32 whose sums over 16 x 40 terms are ordered differently: 9 x sqrt(640) 2^-24 = 2e-5
            got, expected = ours.local[name][tensor].astype(float), value.numpy().astype(float)
            error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-3)
            assert error < 5e-5, (name, tensor)
    for tensor, value in teacher.state_dict().items():
        if "num_batches" not in tensor:
            torch.testing.assert_close(passed_on.state_dict()[tensor], value, rtol=1e-4, atol=1e-5)


def test_the_next_one_takes_the_place_of_who_is_away_and_the_ring_goes_on() -> None:
    ours = federation(laps=2)
    turn(ours)
    state = ours.state
    cohort = ours.strategy.cohort
    assert cohort(("anna", "ben", "cleo"), 2, state) == ("anna",)
    assert cohort(("ben", "cleo"), 2, state) == ("ben",)
    assert cohort(("anna", "ben"), 4, state) == ("anna",)
    assert cohort(NAMES, 5, state) == ("anna",)  # a second lap
    assert cohort((), 2, state) == ()
    assert cohort(("dora",), 2, state) == ()  # who came later is not in the ring


@pytest.mark.slow
def test_the_ring_goes_on_from_who_was_last_and_who_comes_back_has_its_place() -> None:
    ours = federation(laps=3)
    turn(ours)
    order = []
    for away in ("", "ben", "ben", "", "", ""):
        there = [name for name in NAMES if name != away]
        (member,) = ours.strategy.cohort(there, ours.number + 1, ours.state)
        ours.round((member,))
        order.append(member)
    assert order == ["anna", "cleo", "anna", "ben", "cleo", "anna"]


@pytest.mark.slow
def test_a_skipped_round_is_not_repeated_with_the_same_client() -> None:
    ours = federation(laps=2)
    turn(ours)
    assert ours.strategy.cohort(NAMES, 2, ours.state) == ("anna",)
    assert ours.strategy.cohort(NAMES, 3, ours.state) == ("ben",)


@pytest.mark.slow
def test_nobody_is_judged_where_there_is_no_teacher() -> None:
    ours = federation()
    ours.number = 1
    result, _ = ours.client("anna")
    assert float(result.state["measured"]) == float(result.state["teacher_correct"]) == 0.0
    assert float(result.state["measured_after"]) == 9.0  # every fifth of 45 windows
    ours.tensors = {**ours.tensors, "stage": np.float32(1.0)}
    result, _ = ours.client("anna")
    assert float(result.state["measured"]) == 9.0


@pytest.mark.slow
def test_a_lost_turn_changes_neither_the_ring_nor_the_client() -> None:
    ours = federation()
    turn(ours)
    before, kept = copy.deepcopy(dict(ours.tensors)), copy.deepcopy(ours.local["anna"])
    with pytest.raises(AggregationError, match="no updates"):
        ours.round(("anna",), lost=("anna",))
    assert all(np.array_equal(ours.tensors[name], array) for name, array in before.items())
    assert all(np.array_equal(ours.local["anna"][name], array) for name, array in kept.items())


@pytest.mark.slow
def test_two_clients_in_a_turn_are_an_error() -> None:
    ours = federation()
    turn(ours)
    updates = []
    for name in ("anna", "ben"):
        result, update = ours.client(name)
        updates.append(
            Contribution(name, result.num_examples, lambda update=update: update, result.num_steps)
        )
    with pytest.raises(AggregationError, match="one client"):
        ours.strategy.server(ours.plan.tensors, ours.tensors, ours.state, updates)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": -0.1},
        {"strength": float("nan")},
        {"share_norm": "maybe"},
        {"laps": 0},
        {"warm_rounds": 0},
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        create_strategy("metafed", options)


def test_the_weight_of_the_teacher_follows_how_much_better_it_is() -> None:
    def weight(own: float, theirs: float, stage: float = 2.0, good: float = 1.0) -> float:
        numbers = {
            "own_correct": own * 100,
            "teacher_correct": theirs * 100,
            "measured": 100.0,
            "stage": stage,
            "good_enough": good,
            "strength": 2.0,
        }
        return float(MetaFed()._weight({n: torch.tensor(v) for n, v in numbers.items()}))

    assert weight(0.8, 0.8) == pytest.approx(0.2)  # lambda_0 / 10
    assert weight(0.7, 0.9) == pytest.approx(2.0)  # lambda_0 from 0.2 better on
    assert weight(0.5, 0.95) == pytest.approx(2.0)
    assert weight(0.9, 0.8) == pytest.approx(0.2 * 10**-0.5, rel=1e-5)  # worse, but above the threshold
    assert weight(0.6, 0.45) == 0.0  # worse and below
    assert weight(0.6, 0.9, stage=1.0) == 2.0
    assert weight(0.6, 0.9, stage=0.0) == 0.0
    assert weight(0.6, 0.9, good=0.0) == 0.0
