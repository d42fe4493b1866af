"""A federated round as a state machine: ``advance(round, event, now) -> (round, effects)``.

    PLANNED --CohortSelected--> RUNNING --enough updates / deadline--> AGGREGATING --Aggregated--> PUBLISHED
                                   |                                        |
                                   +-- too few updates --> SKIPPED <--------+ AggregationFailed
    every state that is not final --Aborted--> ABORTED

A buffered round (``RoundPolicy.max_staleness``) ends when it has the wanted updates, and at the deadline if it has a
quorum, always in aggregation: who is at work then is carried over to the next one (``next_round``).

Nothing here performs anything: the service stores the returned round and carries out the effects, in one transaction
with the event where the effect is an answer. After a crash it reads the round back and reports ``ServiceRestarted``,
whose effects start again what was lost. An update counts once: its key is (round, client, attempt), and a client has at
most one accepted update.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.tensors import Digest

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
from wearfleet_cloud.federated.round_record import (
    TERMINAL,
    Carried,
    Receipt,
    Round,
    RoundPolicy,
    RoundState,
    next_round,
)

__all__ = [
    "TABLE",
    "TERMINAL",
    "Carried",
    "Receipt",
    "Round",
    "RoundPolicy",
    "RoundState",
    "advance",
    "next_round",
]

Outcome = tuple[Round, tuple[Effect, ...]]


def advance(current: Round, event: Event, now: float) -> Outcome:
    """What an event makes of a round.

    Args:
        current: the round as stored.
        event: what happened.
        now: Unix seconds.

    Returns:
        The round after it, and what the service has to do, in order.

    Raises:
        ProtocolError: the event cannot happen in this state, or carries impossible values.
    """
    entry = TABLE.get((current.state, type(event)))
    if entry is None:
        raise ProtocolError(
            f"round {current.number} of run {current.run_id} is {current.state} and cannot take {type(event).__name__}"
        )
    rule, targets = entry
    after, effects = rule(current, event, now)
    assert after.state in targets, f"{current.state} -> {after.state} is not in the table"
    return after, effects


def _invite(current: Round, event: CohortSelected, now: float) -> Outcome:
    clients = tuple(sorted({*event.clients, *(c.client for c in current.carried)}))
    most = event.wanted if current.policy.buffered else len(clients)
    if not clients or not 1 <= event.wanted <= most:
        raise ProtocolError(
            f"a cohort needs clients, and 1 to {len(clients)} wanted updates; got {event.wanted}"
        )
    deadline = now + current.policy.deadline_s
    after = replace(
        current,
        state=RoundState.RUNNING,
        invited=clients,
        wanted=event.wanted,
        deadline=deadline,
        slots=event.slots or len(clients),
        carried=tuple(c for c in current.carried if c.client not in event.clients),
    )
    return after, (InviteClients(clients), ArmDeadline(deadline))


def _fetch(current: Round, event: TaskFetched, _: float) -> Outcome:
    if event.client not in current.invited:
        return current, (_denied(event.client),)
    current = _present(current, event.client)
    if event.client in current.fetched:
        return current, ()
    carried = tuple(c for c in current.carried if c.client != event.client)  # what it was at work on is gone
    return replace(current, fetched=(*current.fetched, event.client), carried=carried), ()


def _give_away(current: Round, event: SlotsGivenAway, _: float) -> Outcome:
    """Only clients that may still answer can be lost, and only others take the slots that are free then."""
    lost = tuple(c for c in current.at_work if c in event.lost)
    after = replace(
        current,
        lost=(*current.lost, *lost),
        carried=tuple(c for c in current.carried if c.client not in lost),
    )
    added = sorted(set(event.clients) - set(current.invited))[: after.free_slots]
    after = replace(after, invited=tuple(sorted((*current.invited, *added))))
    after, effects = _proceed(after)
    return after, (*([InviteClients(tuple(added))] if added else []), *effects)


def _return(current: Round, event: ClientReturned, _: float) -> Outcome:
    return _present(current, event.client), ()


def _present(current: Round, client: str) -> Round:
    if client not in current.lost:
        return current
    return replace(current, lost=tuple(c for c in current.lost if c != client))


def _submit(current: Round, event: UpdateSubmitted, _: float) -> Outcome:
    answered = _known(current, event)
    if answered is not None:
        return current, (answered,)
    if event.num_examples < 1:
        return _reject(current, UpdateRejected(event.client, event.attempt, "no training windows"), _)
    after = replace(
        _present(current, event.client),
        receipts=(*current.receipts, _receipt(current, event)),
        carried=tuple(c for c in current.carried if c.client != event.client),
        rejected=tuple(row for row in current.rejected if row[0] != event.client),
        declined=tuple(row for row in current.declined if row[0] != event.client),
    )
    after, effects = _proceed(after)
    return after, (Answer(event.client, AnswerStatus.ACCEPTED), *effects)


def _receipt(current: Round, event: UpdateSubmitted) -> Receipt:
    task = current.carried_task(event.client)
    stale = task is not None and task.attempt == event.attempt
    return Receipt(
        event.client,
        event.attempt,
        event.digest,
        event.num_examples,
        event.num_steps,
        staleness=task.staleness if task is not None and stale else 0,
        base=task.base if task is not None and stale else "",
    )


def _submit_late(current: Round, event: UpdateSubmitted, _: float) -> Outcome:
    answered = _known(current, event)
    return current, (answered or Answer(event.client, AnswerStatus.STALE, f"the round is {current.state}"),)


def _known(current: Round, event: UpdateSubmitted) -> Answer | None:
    """The answer to a submission that must not count (again); None when it is new."""
    if event.client not in current.invited:
        return _denied(event.client)
    receipt = current.accepted(event.client)
    if receipt is None:
        return None
    if receipt.digest == event.digest:
        return Answer(event.client, AnswerStatus.DUPLICATE)
    return Answer(
        event.client,
        AnswerStatus.CONFLICT,
        f"another update of this client was accepted (attempt {receipt.attempt}, {receipt.digest})",
    )


def _reject(current: Round, event: UpdateRejected, _: float) -> Outcome:
    if event.client not in current.invited:
        return current, (_denied(event.client),)
    answer = Answer(event.client, AnswerStatus.REJECTED, event.reason)
    if current.accepted(event.client) is not None:
        return current, (answer,)
    others = tuple(row for row in current.rejected if row[0] != event.client)
    after, effects = _proceed(replace(current, rejected=(*others, (event.client, event.reason))))
    return after, (answer, *effects)


def _reject_late(current: Round, event: UpdateRejected, _: float) -> Outcome:
    if event.client not in current.invited:
        return current, (_denied(event.client),)
    return current, (Answer(event.client, AnswerStatus.REJECTED, event.reason),)


def _decline(current: Round, event: ClientDeclined, _: float) -> Outcome:
    if event.client not in current.invited:
        return current, (_denied(event.client),)
    if current.accepted(event.client) is not None or event.client in dict(current.declined):
        return current, ()
    return _proceed(replace(current, declined=(*current.declined, (event.client, event.reason))))


def _deadline(current: Round, _: DeadlinePassed, now: float) -> Outcome:
    if now < current.deadline:
        return current, (ArmDeadline(current.deadline),)
    if current.has_quorum:
        return _aggregate(current)
    if current.policy.buffered:  # nobody waits for it: slots are given away when their leases run out
        deadline = now + current.policy.deadline_s
        return replace(current, deadline=deadline), (ArmDeadline(deadline),)
    if not current.extended and current.policy.extension_s > 0:
        deadline = now + current.policy.extension_s
        return replace(current, extended=True, deadline=deadline), (ArmDeadline(deadline),)
    return _skip(current, "deadline passed")


def _proceed(current: Round) -> Outcome:
    """Go on when there is nothing left to wait for."""
    if len(current.receipts) >= current.wanted and current.has_quorum:
        return _aggregate(current)
    if current.policy.buffered or current.at_work:
        return current, ()
    return (
        _aggregate(current) if current.has_quorum else _skip(current, "every client has answered or is lost")
    )


def _aggregate(current: Round) -> Outcome:
    after = replace(current, state=RoundState.AGGREGATING)
    released = () if current.policy.buffered else _release(current)
    return after, (*released, _start(after))


def _skip(current: Round, why: str) -> Outcome:
    reason = (
        f"{why} with {len(current.receipts)} of at least {current.policy.quorum} updates and "
        f"{sum(r.num_examples for r in current.receipts)} of at least {current.policy.min_examples} windows"
    )
    after = replace(current, state=RoundState.SKIPPED, reason=reason)
    return after, (*_release(current), KeepModel(reason))


def _publish(current: Round, event: Aggregated, _: float) -> Outcome:
    after = replace(
        current,
        state=RoundState.PUBLISHED,
        result=event.digest,
        result_state=event.state,
        judged=event.judged,
    )
    return after, (Publish(event.digest),)


def _fail(current: Round, event: AggregationFailed, _: float) -> Outcome:
    after = replace(current, state=RoundState.SKIPPED, reason=event.reason, judged=event.judged)
    return after, (KeepModel(event.reason),)


def _abort(current: Round, event: Aborted, _: float) -> Outcome:
    after = replace(current, state=RoundState.ABORTED, reason=event.reason)
    return after, (*_release(current), KeepModel(event.reason))


def _restart_planned(current: Round, _: ServiceRestarted, __: float) -> Outcome:
    return current, (SelectCohort(),)


def _restart_running(current: Round, _: ServiceRestarted, __: float) -> Outcome:
    return current, (InviteClients(_waiting_for(current)), ArmDeadline(current.deadline))


def _restart_aggregating(current: Round, _: ServiceRestarted, __: float) -> Outcome:
    return current, (_start(current),)


def _restart_published(current: Round, _: ServiceRestarted, __: float) -> Outcome:
    return current, (Publish(Digest(current.result)),)


def _ignore(current: Round, _: Event, __: float) -> Outcome:
    return current, ()


def _start(current: Round) -> StartAggregation:
    return StartAggregation({r.client: r.digest for r in sorted(current.receipts, key=lambda r: r.client)})


def _release(current: Round) -> tuple[Effect, ...]:
    waiting = _waiting_for(current)
    return (ReleaseClients(waiting),) if waiting else ()


def _waiting_for(current: Round) -> tuple[str, ...]:
    done = {r.client for r in current.receipts} | dict(current.declined).keys()
    return tuple(client for client in current.invited if client not in done)


def _denied(client: str) -> Answer:
    return Answer(client, AnswerStatus.DENIED, "this client was not invited to the round")


Rule = Callable[[Round, Any, float], Outcome]

_S = RoundState
_LATE: Final[dict[type[Event], Rule]] = {
    TaskFetched: _ignore,
    UpdateSubmitted: _submit_late,
    UpdateRejected: _reject_late,
    ClientDeclined: _ignore,
    SlotsGivenAway: _ignore,
    ClientReturned: _ignore,
    DeadlinePassed: _ignore,
}

TABLE: Final[Mapping[tuple[RoundState, type[Event]], tuple[Rule, frozenset[RoundState]]]] = {
    (_S.PLANNED, CohortSelected): (_invite, frozenset({_S.RUNNING})),
    (_S.PLANNED, TaskFetched): (_fetch, frozenset({_S.PLANNED})),
    (_S.PLANNED, UpdateSubmitted): (_submit_late, frozenset({_S.PLANNED})),
    (_S.PLANNED, UpdateRejected): (_reject_late, frozenset({_S.PLANNED})),
    (_S.PLANNED, Aborted): (_abort, frozenset({_S.ABORTED})),
    (_S.PLANNED, ServiceRestarted): (_restart_planned, frozenset({_S.PLANNED})),
    (_S.RUNNING, TaskFetched): (_fetch, frozenset({_S.RUNNING})),
    (_S.RUNNING, UpdateSubmitted): (_submit, frozenset({_S.RUNNING, _S.AGGREGATING, _S.SKIPPED})),
    (_S.RUNNING, UpdateRejected): (_reject, frozenset({_S.RUNNING, _S.AGGREGATING, _S.SKIPPED})),
    (_S.RUNNING, ClientDeclined): (_decline, frozenset({_S.RUNNING, _S.AGGREGATING, _S.SKIPPED})),
    (_S.RUNNING, SlotsGivenAway): (_give_away, frozenset({_S.RUNNING, _S.AGGREGATING, _S.SKIPPED})),
    (_S.RUNNING, ClientReturned): (_return, frozenset({_S.RUNNING})),
    (_S.RUNNING, DeadlinePassed): (_deadline, frozenset({_S.RUNNING, _S.AGGREGATING, _S.SKIPPED})),
    (_S.RUNNING, Aborted): (_abort, frozenset({_S.ABORTED})),
    (_S.RUNNING, ServiceRestarted): (_restart_running, frozenset({_S.RUNNING})),
    **{(_S.AGGREGATING, kind): (rule, frozenset({_S.AGGREGATING})) for kind, rule in _LATE.items()},
    (_S.AGGREGATING, Aggregated): (_publish, frozenset({_S.PUBLISHED})),
    (_S.AGGREGATING, AggregationFailed): (_fail, frozenset({_S.SKIPPED})),
    (_S.AGGREGATING, Aborted): (_abort, frozenset({_S.ABORTED})),
    (_S.AGGREGATING, ServiceRestarted): (_restart_aggregating, frozenset({_S.AGGREGATING})),
    **{
        (state, kind): (rule, frozenset({state}))
        for state in sorted(TERMINAL)
        for kind, rule in _LATE.items()
    },
    **{(state, Aborted): (_ignore, frozenset({state})) for state in sorted(TERMINAL)},
    (_S.PUBLISHED, ServiceRestarted): (_restart_published, frozenset({_S.PUBLISHED})),
    (_S.SKIPPED, ServiceRestarted): (_ignore, frozenset({_S.SKIPPED})),
    (_S.ABORTED, ServiceRestarted): (_ignore, frozenset({_S.ABORTED})),
}
"""(state, event) -> what happens, and the states that may follow. An event that is not here is refused."""
