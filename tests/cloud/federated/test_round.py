"""The round's state machine: examples of every path, then laws over random sequences of events."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wearfleet_cloud.federated.round import (
    TABLE,
    TERMINAL,
    Carried,
    Receipt,
    Round,
    RoundPolicy,
    RoundState,
    advance,
    next_round,
)
from wearfleet_cloud.federated.round_events import (
    Aborted,
    Aggregated,
    AggregationFailed,
    Answer,
    AnswerStatus,
    ArmDeadline,
    ClientDeclined,
    ClientReturned,
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
    SlotsGivenAway,
    StartAggregation,
    TaskFetched,
    UpdateRejected,
    UpdateSubmitted,
)
from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.tensors import Digest, digest_of

BASE, RESULT = digest_of(b"base"), digest_of(b"result")
CLIENTS = ("a", "b", "c")


def planned(**policy: float | None) -> Round:
    defaults: dict[str, float] = {"quorum": 2, "deadline_s": 100.0, "extension_s": 50.0}
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


def buffered(number: int = 1, **changes: object) -> Round:
    """A buffer of two updates, three clients at work, updates of the last two versions allowed."""
    before = replace(planned(max_staleness=2, quorum=1), number=number, **changes)  # type: ignore[arg-type]
    return advance(before, CohortSelected(CLIENTS, 2, 3), 1000.0)[0]


def attempt_of(number: int, client: str) -> str:
    return f"{client}-{number}"


def full(current: Round, first: str, second: str, result: bytes) -> Round:
    """The buffer with two updates, published."""
    fetched = [TaskFetched(client) for client in current.invited if current.carried_task(client) is None]
    sent = [submitted(client, attempt=f"{client}-{current.number}") for client in (first, second)]
    after, _ = play(current, *fetched, *sent, Aggregated(digest_of(result)))
    assert after.state == RoundState.PUBLISHED
    return after


def test_a_full_buffer_releases_nobody_and_who_is_at_work_goes_on_into_the_next_one() -> None:
    after, effects = play(buffered(), TaskFetched("b"), submitted("a"), submitted("c"))
    assert after.state == RoundState.AGGREGATING
    assert not any(isinstance(effect, ReleaseClients) for effect in effects)
    following = next_round(advance(after, Aggregated(RESULT), 1.0)[0], attempt_of)
    assert (following.number, following.base, following.state) == (2, RESULT, RoundState.PLANNED)
    assert following.carried == (Carried("b", "b-1", BASE, 1),)


def test_a_late_update_counts_with_its_staleness_until_it_is_too_old() -> None:
    current = full(buffered(), "a", "c", b"1")
    following = next_round(current, attempt_of)
    second, effects = play(following, CohortSelected(("a", "c"), 2, 3), submitted("b", attempt="b-1"))
    assert (second.invited, answer(effects)) == (CLIENTS, AnswerStatus.ACCEPTED)
    assert second.receipts == (Receipt("b", "b-1", digest_of(b"b"), 10, 0, 1, BASE),)
    assert second.carried == ()
    repeated, effects = advance(second, submitted("b", attempt="b-1"), 1.0)
    assert (repeated, answer(effects)) == (second, AnswerStatus.DUPLICATE)
    for number, staleness in ((2, 1), (3, 2)):
        following = next_round(current, attempt_of)
        assert following.carried == (Carried("b", "b-1", BASE, staleness),)
        current = full(advance(following, CohortSelected(("a", "c"), 2, 3), 1.0)[0], "a", "c", b"%d" % number)
    assert next_round(current, attempt_of).carried == ()  # three versions: too old


def test_a_skipped_buffer_makes_nobody_staler() -> None:
    failed, _ = play(
        buffered(), TaskFetched("b"), submitted("a"), submitted("c"), AggregationFailed("overflow")
    )
    following = next_round(failed, attempt_of)
    assert (following.base, following.carried) == (BASE, (Carried("b", "b-1", BASE, 0),))


def test_who_asks_for_a_task_again_has_lost_its_old_one() -> None:
    following = next_round(full(buffered(), "a", "c", b"1"), attempt_of)
    second, _ = play(following, CohortSelected(("a",), 2, 3), TaskFetched("b"), submitted("b", attempt="b-2"))
    assert second.receipts == (Receipt("b", "b-2", digest_of(b"b"), 10),)


def test_a_buffer_waits_past_its_deadline_unless_it_has_a_quorum_and_is_never_skipped_for_time() -> None:
    waiting, effects = advance(buffered(), DeadlinePassed(), 1100.0)
    assert (waiting.state, effects) == (RoundState.RUNNING, (ArmDeadline(1200.0),))
    declined, _ = play(waiting, *(ClientDeclined(client, "") for client in CLIENTS))
    assert (declined.state, declined.free_slots) == (RoundState.RUNNING, 3)
    part, _ = play(declined, SlotsGivenAway((), ("d",)), submitted("d"))
    assert advance(part, DeadlinePassed(), 1200.0)[0].state == RoundState.AGGREGATING


def test_an_answer_frees_a_slot_of_a_buffer_and_a_lost_client_one_of_every_round() -> None:
    assert (buffered().free_slots, play(buffered(), submitted("a"))[0].free_slots) == (0, 1)
    assert play(running(), submitted("a"))[0].free_slots == 0
    for current in (buffered(), running()):
        lost, effects = play(current, SlotsGivenAway(("b",), ("e", "d")))
        assert (lost.lost, lost.invited, effects) == (("b",), ("a", "b", "c", "d"), (InviteClients(("d",)),))
        assert lost.free_slots == 0


def test_a_lost_client_that_returns_takes_part_again() -> None:
    lost, _ = play(running(), SlotsGivenAway(("b",), ("d",)))
    for event in (ClientReturned("b"), TaskFetched("b"), submitted("b")):
        assert play(lost, event)[0].lost == ()
    done, _ = play(lost, submitted("b"), submitted("a"), submitted("c"))
    assert {r.client for r in done.receipts} == {"a", "b", "c"}


def test_a_round_does_not_wait_for_lost_clients() -> None:
    after, _ = play(running(), submitted("a"), submitted("c"), SlotsGivenAway(("b",), ()))
    assert after.state == RoundState.AGGREGATING
    after, _ = play(running(), submitted("a"), SlotsGivenAway(("b", "c"), ()))
    assert (after.state, after.lost) == (RoundState.SKIPPED, ("b", "c"))


def test_who_has_answered_or_was_not_invited_cannot_be_lost() -> None:
    before, _ = play(running(), submitted("a"))
    assert advance(before, SlotsGivenAway(("a", "x"), ("y",)), 1.0) == (before, ())


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
    "policy",
    [{"quorum": 0}, {"deadline_s": 0}, {"extension_s": -1}, {"min_examples": 0}, {"max_staleness": -1}],
)
def test_an_impossible_policy_is_refused(policy: dict[str, float]) -> None:
    with pytest.raises(ProtocolError, match=r"out of range|at least 0"):
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
    st.builds(SlotsGivenAway, st.tuples(names), st.one_of(st.just(()), st.tuples(names))),
    st.builds(ClientReturned, names),
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
    staleness=st.sampled_from([None, 0, 2]),
)
def test_laws_hold_over_every_history(
    history: list[tuple[Event, float]],
    aborts: bool,
    quorum: int,
    extension: float,
    restart: bool,
    staleness: int | None,
) -> None:
    current = planned(quorum=quorum, extension_s=extension, max_staleness=staleness)
    if staleness:
        current = replace(current, carried=(Carried("b", "1", BASE, 1), Carried("z", "1", BASE, 2)))
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
        check_clients(after)
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


def check_clients(after: Round) -> None:
    invited, taking_part = set(after.invited), after.state == RoundState.RUNNING
    assert set(after.lost) <= invited
    assert not set(after.lost) & {r.client for r in after.receipts}
    assert not set(after.at_work) & (set(after.answered) | set(after.lost))
    if taking_part:
        assert {c.client for c in after.carried} <= invited
    if after.state == RoundState.SKIPPED and after.policy.buffered:
        assert after.reason == "failed", "a buffer was skipped for time"
    following = next_round(after, attempt_of)
    least = 1 if after.state == RoundState.PUBLISHED else 0
    for task in following.carried:
        assert task.client in after.at_work
        assert least <= task.staleness <= (after.policy.max_staleness or 0)
    assert len({c.client for c in following.carried}) == len(following.carried)


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
