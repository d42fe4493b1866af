"""The ledger: whatever happens to a round, and however often, a client's part in it is entered once."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wearfleet_cloud.federated.privacy.accounting import Spend, epsilon_of
from wearfleet_cloud.federated.privacy.ledger import Ledger, charged, cost_of_round
from wearfleet_cloud.federated.privacy.options import PrivacyOptions
from wearfleet_cloud.federated.round import TERMINAL, Round, RoundPolicy, RoundState, advance
from wearfleet_cloud.federated.round_events import (
    Aborted,
    Aggregated,
    AggregationFailed,
    ClientDeclined,
    CohortSelected,
    DeadlinePassed,
    ServiceRestarted,
    TaskFetched,
    UpdateRejected,
    UpdateSubmitted,
)
from wearfleet_protos.errors import ConfigError, ProtocolError
from wearfleet_protos.tensors import digest_of

CENTRAL = PrivacyOptions("central", 2.0, expected_cohort=3)
CLIENTS = ("anna", "ben", "cleo")
DIGESTS = [digest_of(bytes([i])) for i in range(2)]

EVENTS = st.one_of(
    st.just(CohortSelected(CLIENTS, 3)),
    st.builds(TaskFetched, st.sampled_from(CLIENTS)),
    st.builds(
        UpdateSubmitted,
        st.sampled_from(CLIENTS),
        st.sampled_from(["1", "2"]),
        st.sampled_from(DIGESTS),
        st.just(5),
    ),
    st.builds(UpdateRejected, st.sampled_from(CLIENTS), st.just("1"), st.just("NaN")),
    st.builds(ClientDeclined, st.sampled_from(CLIENTS), st.just("no power")),
    st.just(DeadlinePassed()),
    st.just(Aggregated(DIGESTS[0])),
    st.just(AggregationFailed("overflow")),
    st.just(Aborted("stop")),
    st.just(ServiceRestarted()),
)


def entered(ledger: Ledger, current: Round) -> Ledger:
    cost = cost_of_round(CENTRAL)
    assert cost is not None
    return ledger.with_round((current.run_id, current.number), charged(CENTRAL, current), cost)


@settings(max_examples=120, deadline=None)
@given(events=st.lists(st.tuples(EVENTS, st.integers(1, 3), st.booleans()), max_size=25))
def test_a_round_is_entered_once_for_those_whose_update_was_published(events) -> None:
    """Events come in any order and are repeated; after any of them the service may be killed."""
    current = Round("run", 1, DIGESTS[0], RoundPolicy(quorum=2))
    ledger = Ledger()
    for event, times, killed in [(CohortSelected(CLIENTS, 3), 1, False), *events]:
        for _ in range(times):
            try:
                current, _effects = advance(current, event, 1e12)
            except ProtocolError:
                continue
            ledger = entered(ledger, current)
            assert ledger == entered(ledger, current)
            if killed:
                current, _effects = advance(Round.from_dict(current.to_dict()), ServiceRestarted(), 1e12)
                ledger = entered(ledger, current)
        for client in CLIENTS:
            assert len(ledger.entries.get(client, {})) <= 1
    published = {r.client for r in current.receipts} if current.state == RoundState.PUBLISHED else set()
    expected = published if current.state in TERMINAL else set(current.invited)
    assert {client for client, own in ledger.entries.items() if own} == expected
    for client in expected:
        assert ledger.epsilon(client, 1e-5, "client") == epsilon_of([Spend(2.0)], 1e-5)


def test_a_client_is_refused_when_the_next_round_would_exceed_its_budget() -> None:
    two = epsilon_of([Spend(2.0, 1.0, 2)], 1e-5)
    options = replace(CENTRAL, max_epsilon=two)
    ledger = Ledger()
    for number in (1, 2):
        assert ledger.refusal("anna", options) == ""
        ledger = ledger.with_round(("run", number), ["anna"], Spend(2.0))
    reason = ledger.refusal("anna", options)
    assert f"{two:.3g} is spent" in reason
    assert "at most" in reason
    assert ledger.refusal("ben", options) == ""
    assert replace(ledger).refusal("anna", replace(options, max_epsilon=math.inf)) == ""


def test_rounds_of_other_runs_and_with_other_noise_count_too() -> None:
    ledger = (
        Ledger().with_round(("one", 1), ["anna"], Spend(2.0)).with_round(("two", 1), ["anna"], Spend(1.0))
    )
    assert ledger.epsilon("anna", 1e-5, "client") == epsilon_of([Spend(1.0), Spend(2.0)], 1e-5)
    assert ledger.epsilon("anna", 1e-5, "client", Spend(0.0)) == math.inf


RECORD = PrivacyOptions("record", 1.1, sampling_rate=0.01, record_steps=100)


def test_records_and_clients_are_never_summed_up() -> None:
    cost = cost_of_round(RECORD)
    assert cost == Spend(1.1, 0.01, 100, "record")
    ledger = Ledger().with_round(("one", 1), ["anna"], Spend(2.0))
    for number in range(1, 11):
        ledger = ledger.with_round(("two", number), ["anna"], cost)
    assert ledger.epsilon("anna", 1e-5, "client") == epsilon_of([Spend(2.0)], 1e-5)
    assert f"{ledger.epsilon('anna', 1e-5, 'record'):.2f}" == "1.73"  # 1000 steps: the anchor of section 18
    with pytest.raises(ConfigError, match="each by itself"):
        ledger.epsilon("anna", 1e-5, "client", cost)


def test_the_budget_of_records_counts_noised_steps_alone() -> None:
    ledger = Ledger().with_round(("one", 1), ["anna"], Spend(0.1))
    cost = cost_of_round(RECORD)
    assert cost is not None
    options = replace(RECORD, max_epsilon=epsilon_of([replace(cost, count=200)], 1e-5))
    for number in (1, 2):
        assert ledger.refusal("anna", options) == ""
        ledger = ledger.with_round(("two", number), ["anna"], cost)
    assert "record-level epsilon" in ledger.refusal("anna", options)


def test_a_round_without_a_number_of_steps_has_every_window_once_in_the_mean() -> None:
    cost = cost_of_round(PrivacyOptions("record", 1.0, sampling_rate=0.3))
    assert cost == Spend(1.0, 0.3, 4, "record")
    assert cost_of_round(PrivacyOptions("record", sampling_rate=0.1)) == Spend(1.0, 0.1, 10, "record")


def test_whoever_is_invited_to_noised_steps_is_charged_whatever_comes_of_the_round() -> None:
    """The device draws noise by itself and may have sent what nobody counts."""
    for state in (RoundState.PUBLISHED, RoundState.SKIPPED):
        current = Round("run", 1, DIGESTS[0], RoundPolicy(), state, CLIENTS)
        assert charged(RECORD, current) == frozenset(CLIENTS)


@pytest.mark.parametrize("state", sorted(RoundState))
def test_without_privacy_nothing_is_entered(state: RoundState) -> None:
    current = Round("run", 1, DIGESTS[0], RoundPolicy(), state, CLIENTS)
    assert charged(PrivacyOptions(), current) == frozenset()
    assert cost_of_round(PrivacyOptions()) is None
