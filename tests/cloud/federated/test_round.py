"""The round's state machine: examples of every path, then laws over random sequences of events."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wearfleet_cloud.federated.round import TABLE, TERMINAL, Receipt, Round, RoundPolicy, RoundState, advance
from wearfleet_cloud.federated.round_events import (
    Aborted,
    Aggregated,
    AggregationFailed,
    Answer,
    AnswerStatus,
    ArmDeadline,
    ClientDeclined,
    CohortSelected,
    DeadlinePassed,
    Effect,
    Event,
    InviteClients,
    KeepModel,
    Publish,
    ReleaseClients,
    SelectCohort,
    ServiceRestarted,
    StartAggregation,
    TaskFetched,
    UpdateRejected,
    UpdateSubmitted,
)
from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.tensors import Digest, digest_of

BASE, RESULT = digest_of(b"base"), digest_of(b"result")
CLIENTS = ("a", "b", "c")


def planned(**policy: float) -> Round:
    defaults = {"quorum": 2, "deadline_s": 100.0, "extension_s": 50.0}
    return Round("run", 1, BASE, RoundPolicy(**{**defaults, **policy}))  # type: ignore[arg-type]


def running(wanted: int = 3, **policy: float) -> Round:
    return advance(planned(**policy), CohortSelected(CLIENTS, wanted), 1000.0)[0]


def submitted(client: str, content: bytes | None = None, attempt: str = "1") -> UpdateSubmitted:
    return UpdateSubmitted(client, attempt, digest_of(content or client.encode()), 10)


def play(current: Round, *events: Event, now: float = 1001.0) -> tuple[Round, tuple[Effect, ...]]:
    effects: tuple[Effect, ...] = ()
    for event in events:
        current, effects = advance(current, event, now)
    return current, effects


def answer(effects: tuple[Effect, ...]) -> AnswerStatus:
    (found,) = (e for e in effects if isinstance(e, Answer))
    return found.status


def test_a_cohort_is_invited_and_a_deadline_armed() -> None:
    after, effects = advance(planned(), CohortSelected(("c", "a"), 2), 1000.0)
    assert (after.state, after.invited, after.deadline) == (RoundState.RUNNING, ("a", "c"), 1100.0)
    assert effects == (InviteClients(("a", "c")), ArmDeadline(1100.0))


def test_all_updates_start_the_aggregation_in_the_order_of_clients() -> None:
    after, effects = play(running(), submitted("c"), submitted("a"), submitted("b"))
    assert after.state == RoundState.AGGREGATING
    assert effects[0] == Answer("b", AnswerStatus.ACCEPTED)
    assert isinstance(effects[-1], StartAggregation)
    assert list(effects[-1].updates.items()) == [(c, digest_of(c.encode())) for c in CLIENTS]


def test_enough_updates_release_the_clients_still_at_work() -> None:
    after, effects = play(running(wanted=2), submitted("a"), submitted("c"))
    assert after.state == RoundState.AGGREGATING
    assert ReleaseClients(("b",)) in effects


def test_the_result_is_published() -> None:
    after, effects = play(running(wanted=2), submitted("a"), submitted("c"), Aggregated(RESULT))
    assert (after.state, after.result, effects) == (RoundState.PUBLISHED, RESULT, (Publish(RESULT),))


def test_a_failed_aggregation_keeps_the_model() -> None:
    after, effects = play(running(wanted=2), submitted("a"), submitted("c"), AggregationFailed("NaN"))
    assert (after.state, after.reason, effects) == (RoundState.SKIPPED, "NaN", (KeepModel("NaN"),))


def test_a_deadline_with_quorum_goes_on_without_the_stragglers() -> None:
    after, effects = play(running(), submitted("a"), submitted("b"))
    assert after.state == RoundState.RUNNING
    after, effects = advance(after, DeadlinePassed(), 1100.0)
    assert after.state == RoundState.AGGREGATING
    assert ReleaseClients(("c",)) in effects


def test_a_deadline_without_quorum_is_extended_once_then_skipped() -> None:
    once, effects = advance(play(running(), submitted("a"))[0], DeadlinePassed(), 1100.0)
    assert (once.state, once.deadline, effects) == (RoundState.RUNNING, 1150.0, (ArmDeadline(1150.0),))
    twice, effects = advance(once, DeadlinePassed(), 1150.0)
    assert twice.state == RoundState.SKIPPED
    assert "1 of at least 2 updates" in twice.reason
    assert isinstance(effects[-1], KeepModel)


def test_a_deadline_that_comes_early_is_armed_again() -> None:
    before = running()
    assert advance(before, DeadlinePassed(), 1099.0) == (before, (ArmDeadline(1100.0),))


def test_too_few_windows_are_no_quorum() -> None:
    after, _ = play(running(min_examples=100, extension_s=0), submitted("a"), submitted("b"))
    assert advance(after, DeadlinePassed(), 1100.0)[0].state == RoundState.SKIPPED


def test_a_round_does_not_wait_for_clients_that_declined() -> None:
    after, _ = play(running(), submitted("a"), ClientDeclined("b", "battery"), submitted("c"))
    assert after.state == RoundState.AGGREGATING
    after, _ = play(running(), ClientDeclined("a", "busy"), ClientDeclined("b", "battery"), submitted("c"))
    assert (after.state, after.declined) == (RoundState.SKIPPED, (("a", "busy"), ("b", "battery")))


def test_a_repeated_submission_gets_the_same_receipt_and_counts_once() -> None:
    once, _ = play(running(), submitted("a"))
    twice, effects = advance(once, submitted("a"), 1002.0)
    assert twice == once
    assert answer(effects) == AnswerStatus.DUPLICATE


@pytest.mark.parametrize("attempt", ["1", "2"])
def test_another_update_of_the_same_client_is_a_conflict(attempt: str) -> None:
    once, _ = play(running(), submitted("a"))
    twice, effects = advance(once, submitted("a", b"other", attempt), 1002.0)
    assert twice == once
    assert answer(effects) == AnswerStatus.CONFLICT


def test_an_uninvited_client_is_denied_whatever_it_does() -> None:
    before = running()
    for event in (submitted("x"), TaskFetched("x"), ClientDeclined("x", ""), UpdateRejected("x", "1", "NaN")):
        after, effects = advance(before, event, 1001.0)
        assert after == before
        assert answer(effects) == AnswerStatus.DENIED


def test_a_late_update_is_stale_but_a_late_repeat_is_a_duplicate() -> None:
    done, _ = play(running(wanted=2), submitted("a"), submitted("b"), Aggregated(RESULT))
    assert answer(advance(done, submitted("c"), 1200.0)[1]) == AnswerStatus.STALE
    assert answer(advance(done, submitted("a"), 1200.0)[1]) == AnswerStatus.DUPLICATE
    assert answer(advance(done, submitted("x"), 1200.0)[1]) == AnswerStatus.DENIED


def test_an_unusable_update_is_not_counted_and_may_be_replaced() -> None:
    bad, effects = play(running(), UpdateRejected("a", "1", "holds NaN"))
    assert (answer(effects), bad.receipts, bad.rejected) == (AnswerStatus.REJECTED, (), (("a", "holds NaN"),))
    good, effects = play(bad, submitted("a", attempt="2"))
    assert (answer(effects), good.rejected) == (AnswerStatus.ACCEPTED, ())
    ended, _ = play(bad, submitted("b"), submitted("c"))
    assert {r.client for r in ended.receipts} == {"b", "c"}
    assert ended.state == RoundState.AGGREGATING


def test_an_update_without_windows_is_rejected() -> None:
    after, effects = play(running(), UpdateSubmitted("a", "1", RESULT, 0))
    assert (answer(effects), after.receipts) == (AnswerStatus.REJECTED, ())


def test_a_restart_takes_up_what_was_under_way() -> None:
    assert advance(planned(), ServiceRestarted(), 1.0)[1] == (SelectCohort(),)
    after, _ = play(running(), submitted("a"))
    assert advance(after, ServiceRestarted(), 1050.0)[1] == (InviteClients(("b", "c")), ArmDeadline(1100.0))
    after, started = play(after, submitted("b"), submitted("c"))
    assert advance(after, ServiceRestarted(), 1050.0)[1] == started[-1:]
    after, _ = play(after, Aggregated(RESULT))
    assert advance(after, ServiceRestarted(), 1050.0)[1] == (Publish(RESULT),)


@pytest.mark.parametrize("state", [s for s in RoundState if s not in TERMINAL])
def test_an_operator_can_abort_every_unfinished_round(state: RoundState) -> None:
    after, effects = advance(replace(running(), state=state), Aborted("stop"), 1.0)
    assert (after.state, after.reason) == (RoundState.ABORTED, "stop")
    assert KeepModel("stop") in effects


IMPOSSIBLE: list[tuple[RoundState, Event]] = [
    (RoundState.PLANNED, Aggregated(RESULT)),
    (RoundState.PLANNED, DeadlinePassed()),
    (RoundState.RUNNING, CohortSelected(CLIENTS, 1)),
    (RoundState.RUNNING, Aggregated(RESULT)),
    (RoundState.AGGREGATING, CohortSelected(CLIENTS, 1)),
    (RoundState.PUBLISHED, Aggregated(RESULT)),
    (RoundState.PUBLISHED, AggregationFailed("x")),
    (RoundState.SKIPPED, Aggregated(RESULT)),
    (RoundState.ABORTED, CohortSelected(CLIENTS, 1)),
]


@pytest.mark.parametrize(("state", "event"), IMPOSSIBLE)
def test_events_outside_the_table_are_refused(state: RoundState, event: Event) -> None:
    with pytest.raises(ProtocolError, match=f"is {state} and cannot take {type(event).__name__}"):
        advance(replace(running(), state=state), event, 1.0)


@pytest.mark.parametrize("cohort", [((), 1), (CLIENTS, 0), (CLIENTS, 4)])
def test_an_impossible_cohort_is_refused(cohort: tuple[tuple[str, ...], int]) -> None:
    with pytest.raises(ProtocolError, match="cohort"):
        advance(planned(), CohortSelected(*cohort), 1.0)


@pytest.mark.parametrize(
    "policy", [{"quorum": 0}, {"deadline_s": 0}, {"extension_s": -1}, {"min_examples": 0}]
)
def test_an_impossible_policy_is_refused(policy: dict[str, float]) -> None:
    with pytest.raises(ProtocolError, match="out of range"):
        planned(**policy)


digests = st.sampled_from([digest_of(c) for c in (b"1", b"2", b"3")])
names = st.sampled_from(["a", "b", "c", "d", "uninvited"])
attempts = st.sampled_from(["1", "2"])
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(CohortSelected, st.just(("a", "b", "c", "d")), st.integers(1, 4)),
    st.builds(TaskFetched, names),
    st.builds(UpdateSubmitted, names, attempts, digests, st.integers(0, 20)),
    st.builds(UpdateRejected, names, attempts, st.just("bad")),
    st.builds(ClientDeclined, names, st.just("no")),
    st.just(DeadlinePassed()),
    st.builds(Aggregated, digests),
    st.just(AggregationFailed("failed")),
    st.just(ServiceRestarted()),
)
histories = st.lists(st.tuples(events, st.floats(0, 80)), max_size=40)


@settings(max_examples=300)
@given(
    history=histories,
    aborts=st.booleans(),
    quorum=st.integers(1, 4),
    extension=st.sampled_from([0.0, 50.0]),
    restart=st.booleans(),
)
def test_laws_hold_over_every_history(
    history: list[tuple[Event, float]], aborts: bool, quorum: int, extension: float, restart: bool
) -> None:
    current = planned(quorum=quorum, extension_s=extension)
    now, counted, aggregations = 0.0, {}, 0
    for event, wait in [*history, *([(Aborted("stop"), 1.0)] if aborts else [])]:
        now += wait
        if restart:  # what is stored is all there is
            current = Round.from_dict(json.loads(json.dumps(current.to_dict())))
        if (current.state, type(event)) not in TABLE:
            with pytest.raises(ProtocolError):
                advance(current, event, now)
            continue
        try:
            after, effects = advance(current, event, now)
        except ProtocolError:
            assert isinstance(event, CohortSelected)
            continue
        check_step(current, after, effects)
        for effect in effects:
            if isinstance(effect, Answer) and effect.status == AnswerStatus.ACCEPTED:
                assert isinstance(event, UpdateSubmitted)
                assert event.client not in counted, "an update was counted twice"
                counted[event.client] = event.digest
            if isinstance(effect, StartAggregation):
                aggregations += not isinstance(event, ServiceRestarted)
                assert dict(effect.updates) == counted
                assert len(counted) >= quorum
        current = after
    assert {r.client: r.digest for r in current.receipts} == counted
    assert aggregations <= 1
    if current.state == RoundState.PUBLISHED:
        assert current.result
        assert aggregations == 1


def check_step(before: Round, after: Round, effects: tuple[Effect, ...]) -> None:
    if before.state in TERMINAL:
        assert after == before, "a finished round changed"
    assert set(before.receipts) <= set(after.receipts), "a receipt was lost"
    assert {r.client for r in after.receipts} <= set(after.invited)
    assert after.extended >= before.extended
    if after.state != before.state and after.state in (RoundState.SKIPPED, RoundState.ABORTED):
        assert any(isinstance(e, KeepModel) for e in effects)
        assert after.reason


@given(history=histories)
def test_a_round_read_back_is_the_round_that_was_stored(history: list[tuple[Event, float]]) -> None:
    current = running()
    for event, wait in history:
        if (current.state, type(event)) in TABLE and not isinstance(event, CohortSelected):
            current, _ = advance(current, event, 1000 + wait)
    assert Round.from_dict(json.loads(json.dumps(current.to_dict()))) == current


@pytest.mark.parametrize(
    "damage", [{"state": "lost"}, {"policy": {"speed": 1}}, {"receipts": [{"client": "a"}]}, {"x": 1}]
)
def test_a_damaged_record_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        Round.from_dict({**running().to_dict(), **damage})


def test_receipts_are_plain_values() -> None:
    after, _ = play(running(), submitted("a"))
    assert after.receipts == (Receipt("a", "1", Digest(digest_of(b"a")), 10),)
