"""FedBuff: a buffer of fresh updates is FedAvg, stale ones weigh less; and the virtual time that makes them stale."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.small_federation import model, splits
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Arrays, Contribution
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.cohort import CohortPolicy, policies_of
from wearfleet_cloud.federated.fedbuff import FedBuff, rebased
from wearfleet_cloud.federated.latency import Latency, read_recorded
from wearfleet_cloud.federated.round_record import RoundPolicy
from wearfleet_cloud.federated.simulate import Outcome, Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import StackedClients
from wearfleet_cloud.federated.virtual_time import VirtualRun
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

SIZES = {"anna": (45, 21), "ben": (20, 30), "cleo": (33, 9), "dan": (40, 12)}
SPLITS = {name: splits(i, *SIZES[name]) for i, name in enumerate(SIZES)}
CLIENTS = tuple(SimulatedClient(n, s["train"], s["holdout"]) for n, s in SPLITS.items())
LOCAL: dict[str, object] = {"batch_size": 16, "learning_rate": 0.05}
SPECS = (TensorSpec("w", "float32", (2,), TensorRole.SHARED, TensorGroup.PARAM),)
ZERO = {"w": np.zeros(2, np.float32)}


def played(strategy: Strategy, **changes: object) -> Outcome:
    simulation = Simulation(**{"rounds": 2, "seed": 7, **changes})  # type: ignore[arg-type]
    return simulate(
        strategy, model("cnn"), Population(CLIENTS), simulation, lambda s: StackedClients(s, model("cnn"), 7)
    )


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("cohort", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_with_equal_latencies_and_concurrency_a_buffer_and_a_cohort_of_one_size_it_is_fedavg_to_the_bit(
    weighting: str, cohort: int
) -> None:
    options = {**LOCAL, "weighting": weighting}
    average = played(create_strategy("fedavg", options), cohort=CohortPolicy(cohort))
    sizes = {"buffer_size": cohort, "concurrency": cohort, "normalise": "weights"}
    buffered = played(create_strategy("fedbuff", {**options, **sizes}))
    assert [r.clients for r in buffered.rounds] == [cohort, cohort]
    for name, array in average.tensors.items():
        np.testing.assert_array_equal(buffered.tensors[name], array)


def test_slow_clients_count_later_and_less_and_the_statistics_stay_possible() -> None:
    times = {"anna": (1.0,), "ben": (1.0,), "cleo": (2.5,), "dan": (math.inf, 1.0)}
    strategy = create_strategy("fedbuff", {**LOCAL, "buffer_size": 2, "concurrency": 4})
    found = played(strategy, rounds=4, latency=Latency(recorded=times))
    # cleo (2.5 s) counts in the third buffer, two versions late, with anna; ben, as fast as anna, in the fourth
    # with dan, who was given up after 2 s and asked again at once
    assert [r.virtual_s for r in found.rounds] == [1.0, 2.0, 3.0, 3.0]
    assert [r.staleness for r in found.rounds] == [0.0, 0.0, 1.0, 1.0]
    assert [r.lost for r in found.rounds] == [0, 0, 1, 0]
    for name, array in found.tensors.items():
        if name.endswith("running_var"):
            assert array.min() >= 0.0


def fold(strategy: FedBuff, *stalenesses: int) -> float:
    """The step that updates of 1 with these stalenesses make."""
    updates = [
        Contribution(f"c{i}", 10, lambda: {"w": np.ones(2, np.float32)}, 1, staleness=s)
        for i, s in enumerate(stalenesses)
    ]
    return float(strategy.server(SPECS, ZERO, {}, updates).tensors["w"][0])


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, (1 + 0.5) / 2),  # 1 and (1 + 3)^-1/2
        ({"normalise": "weights"}, 1.0),
        ({"staleness_weight": "constant"}, 1.0),
        ({"exponent": 1.0}, (1 + 0.25) / 2),
        ({"staleness_weight": "hinge", "hinge_start": 1, "hinge_slope": 2.0}, (1 + 0.2) / 2),
        ({"server_learning_rate": 0.5}, 0.5 * (1 + 0.5) / 2),
    ],
)
def test_known_steps_of_a_fresh_update_and_one_three_versions_old(
    options: dict[str, object], step: float
) -> None:
    strategy = create_strategy("fedbuff", options)
    assert isinstance(strategy, FedBuff)
    assert fold(strategy, 0, 3) == pytest.approx(step, rel=2**-23)  # one rounding to float32


@given(kind=st.sampled_from(["polynomial", "constant", "hinge"]), staleness=st.integers(0, 100))
def test_weights_begin_at_one_and_never_grow(kind: str, staleness: int) -> None:
    strategy = FedBuff(staleness_weight=kind)
    assert strategy.alpha(0) == 1.0
    assert 0.0 < strategy.alpha(staleness + 1) <= strategy.alpha(staleness) <= 1.0


def test_statistics_of_an_old_version_are_those_the_client_has() -> None:
    mean, variance = (
        TensorSpec(n, "float32", (1,), TensorRole.NORM_STAT, TensorGroup.BUFFER) for n in ("m", "v")
    )
    specs = (*SPECS, mean, variance)

    def tensors(w: float, m: float, v: float) -> Arrays:
        values = {"w": [w, w], "m": [m], "v": [v]}
        return {name: np.array(value, np.float32) for name, value in values.items()}

    base, current, own = tensors(0, 1, 2), tensors(5, 1.5, 0.5), tensors(1, 0.5, 1)
    difference = {name: own[name] - array for name, array in base.items()}  # type: ignore[operator]
    assert difference["v"] + current["v"] < 0, "the plain difference would make a negative variance"
    moved = rebased(difference, specs, base, current)
    folded = (
        FedBuff().server(specs, current, {}, [Contribution("a", 3, lambda: moved, 1, staleness=1)]).tensors
    )
    assert (folded["m"], folded["v"]) == (np.float32(0.5), np.float32(1))
    np.testing.assert_allclose(folded["w"], 5 + 2**-0.5, rtol=2**-23)


@pytest.mark.parametrize(
    "options",
    [
        {"buffer_size": 0}, {"concurrency": 3}, {"max_staleness": -1}, {"staleness_weight": "none"},
        {"normalise": "sum"}, {"exponent": -1}, {"server_learning_rate": 0}, {"hinge_slope": "nan"},
    ],
)  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        create_strategy("fedbuff", options)


def test_a_cohort_beside_a_buffer_is_refused() -> None:
    buffering = FedBuff().buffering
    for cohort in (CohortPolicy(5), CohortPolicy(0, 1, 1.5)):
        with pytest.raises(ConfigError, match="buffer_size"):
            policies_of(buffering, cohort, RoundPolicy())
    cohort, policy = policies_of(buffering, CohortPolicy(), RoundPolicy())
    assert (cohort.cohort_size, cohort.concurrency, policy.max_staleness) == (10, 30, 10)


names = [f"client-{i:02d}" for i in range(12)]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 6),
    more=st.integers(0, 8),
    staleness=st.integers(0, 3),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_every_task_counts_at_most_once_and_no_buffer_holds_a_client_twice_or_too_old(
    size: int, more: int, staleness: int, dropout: float, seed: int
) -> None:
    buffering = replace(FedBuff(buffer_size=size, concurrency=size + more).buffering, max_staleness=staleness)
    policies = policies_of(
        buffering, CohortPolicy(), RoundPolicy(deadline_s=1e6)
    )  # no part of a buffer is enough
    run = VirtualRun(dict.fromkeys(names, 10), *policies, Latency(10.0, 1.0, 0.5, dropout, seed), seed, 20.0)
    again = VirtualRun(
        dict.fromkeys(names, 10), *policies, Latency(10.0, 1.0, 0.5, dropout, seed), seed, 20.0
    )
    counted, before = set(), 0.0
    for _ in range(8):
        played_round = run.play()
        assert played_round == again.play()
        assert played_round.published
        assert played_round.ended_s >= before
        before = played_round.ended_s
        clients = [c.client for c in played_round.counted]
        assert len(set(clients)) == len(clients) == size
        for c in played_round.counted:
            assert (c.client, c.task) not in counted
            counted.add((c.client, c.task))
            assert 0 <= c.staleness <= staleness
            assert c.staleness == played_round.number - c.task  # every buffer was published


def test_a_synchronous_round_takes_the_first_ones_of_an_over_selected_cohort_and_ends_at_its_deadline() -> (
    None
):
    times = {name: (float(1 + i),) for i, name in enumerate(names)}
    late = RoundPolicy(quorum=2, deadline_s=5.5)

    def play(policy: RoundPolicy, latency: Latency) -> tuple[int, float, bool]:
        run = VirtualRun(dict.fromkeys(names, 10), CohortPolicy(8, 1, 1.5), policy, latency, 0, 100.0)
        ended = run.play()
        return len(ended.counted), ended.ended_s, ended.published

    assert play(RoundPolicy(), Latency(recorded=times)) == (8, 8.0, True)
    assert play(late, Latency(recorded=times)) == (5, 5.5, True)
    assert play(replace(late, quorum=6), Latency(recorded=times)) == (0, 5.5, False)
    extended = replace(late, quorum=6, extension_s=1.0)
    assert play(extended, Latency(recorded=times)) == (6, 6.5, True)
    assert play(replace(late, min_examples=51), Latency(recorded=times)) == (0, 5.5, False)
    nobody = dict.fromkeys(names, (math.inf,))
    assert play(RoundPolicy(), Latency(recorded=nobody)) == (0, 100.0, False)


def test_a_buffer_that_nobody_would_ever_fill_is_refused() -> None:
    nobody = Latency(recorded=dict.fromkeys(SIZES, (math.inf, math.inf)))
    with pytest.raises(ConfigError, match="no client ever answers"):
        played(FedBuff(buffer_size=2, concurrency=3), latency=nobody)


def test_recorded_times_are_used_in_turn_and_bad_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "times.csv"
    file.write_text("client,seconds\nanna,2.5\nanna,\nben,1\n")
    latency = Latency(recorded=read_recorded(file))
    assert [latency.seconds("anna", task) for task in (1, 2, 3)] == [2.5, math.inf, 2.5]
    assert latency.seconds("cleo", 1) == 1.0
    for text in ("who,seconds\na,1\n", "client,seconds\na,-1\n", "client,seconds\na,soon\n"):
        file.write_text(text)
        with pytest.raises(ConfigError):
            read_recorded(file)


def test_drawn_times_have_the_median_spread_and_losses_that_were_asked_for() -> None:
    latency = Latency(10.0, 0.8, 0.3, 0.25, 3)
    drawn = np.array([[latency.seconds(f"c{i}", task) for task in range(1, 21)] for i in range(400)])
    finite = np.isfinite(drawn)
    # 8000 tasks: the share lost has standard deviation 0.0048; four of them
    assert abs(1 - finite.mean() - 0.25) < 0.02
    logs = np.where(finite, np.log(np.where(finite, drawn, 1.0)), np.nan)
    means = np.nanmean(logs, axis=1)
    # 400 clients: standard errors 0.8 / 20 = 0.04 of the mean, 0.8 / sqrt(800) = 0.03 of the deviation; four of them
    assert abs(means.mean() - math.log(10)) < 0.16
    assert abs(means.std() - 0.8) < 0.12
    assert abs(np.nanmean(np.nanstd(logs, axis=1)) - 0.3) < 0.05
