"""Queries about federated runs, their rounds and what devices handed in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from wearfleet_protos.errors import NotFoundError

from wearfleet_cloud.storage.device_records import bump_revision
from wearfleet_cloud.storage.tables import rounds, runs, submissions

__all__ = [
    "RoundRow",
    "RunRow",
    "Submission",
    "Version",
    "find_run",
    "find_submission",
    "finish_run",
    "insert_run",
    "insert_submissions",
    "last_round",
    "last_versions",
    "list_rounds",
    "list_runs",
    "list_submissions",
    "next_running",
    "save_round",
    "set_run_tensors",
    "stop_run",
]


@dataclass(frozen=True, slots=True)
class RunRow:
    """One federated run; ``state`` is running, done or stopped; ``tensors_digest`` the newest global version."""

    run_id: str
    strategy: str
    state: str
    plan_digest: str
    tensors_digest: str
    settings: Mapping[str, Any]
    created_ns: int
    finished_ns: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One round of a run; ``kind`` is train or personalise, ``snapshot`` the state machine's value."""

    run_id: str
    round: int
    kind: str
    state: str
    base_digest: str
    opened_ns: int
    snapshot: Mapping[str, Any]
    result_digest: str | None = None
    closed_ns: int | None = None
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True, slots=True)
class Submission:
    """One accepted submission."""

    run_id: str
    round: int
    attempt_id: str
    device_id: str
    update_digest: str
    num_examples: int
    num_steps: int
    train_seconds: float
    local_state_reset: bool
    received_ns: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Version:
    """Digests of the global tensors before and after a round that gave some, and of the server's state after it."""

    base: str
    result: str
    state: str


def insert_run(connection: Connection, run: RunRow) -> None:
    """Store a new run; a running service picks it up."""
    connection.execute(sa.insert(runs), _values(run))
    bump_revision(connection)


def find_run(connection: Connection, run_id: str) -> RunRow:
    """One run.

    Raises:
        NotFoundError: no run has this id.
    """
    row = connection.execute(sa.select(runs).where(runs.c.run_id == run_id)).mappings().first()
    if row is None:
        raise NotFoundError(f"no run {run_id!r}; `wearfleet-cloud federation status` shows all")
    return RunRow(**row)


def list_runs(connection: Connection) -> list[RunRow]:
    """All runs, oldest first."""
    rows = connection.execute(sa.select(runs).order_by(runs.c.created_ns, runs.c.run_id)).mappings()
    return [RunRow(**row) for row in rows]


def next_running(connection: Connection) -> RunRow | None:
    """The oldest run that is not finished."""
    query = (
        sa.select(runs).where(runs.c.state == "running").order_by(runs.c.created_ns, runs.c.run_id).limit(1)
    )
    row = connection.execute(query).mappings().first()
    return None if row is None else RunRow(**row)


def set_run_tensors(connection: Connection, run_id: str, digest: str) -> None:
    """Note the newest global version."""
    connection.execute(sa.update(runs).where(runs.c.run_id == run_id).values(tensors_digest=digest))


def finish_run(connection: Connection, run_id: str, state: str, now_ns: int, reason: str = "") -> bool:
    """End a run that is running; False when it had ended before."""
    result = connection.execute(
        sa.update(runs)
        .where(runs.c.run_id == run_id, runs.c.state == "running")
        .values(state=state, finished_ns=now_ns, reason=reason[:500])
    )
    return result.rowcount == 1


def stop_run(connection: Connection, run_id: str, now_ns: int, reason: str) -> bool:
    """End a run from outside; a running service notices. False when it had ended before.

    Raises:
        NotFoundError: no run has this id.
    """
    find_run(connection, run_id)
    stopped = finish_run(connection, run_id, "stopped", now_ns, reason)
    bump_revision(connection)
    return stopped


def save_round(connection: Connection, row: RoundRow) -> None:
    """Store the state of a round, new or known."""
    values = _values(row)
    same = (rounds.c.run_id == row.run_id) & (rounds.c.round == row.round)
    if connection.execute(sa.update(rounds).where(same).values(**values)).rowcount == 0:
        connection.execute(sa.insert(rounds), values)


def last_round(connection: Connection, run_id: str) -> RoundRow | None:
    """The newest round of a run."""
    query = sa.select(rounds).where(rounds.c.run_id == run_id).order_by(rounds.c.round.desc()).limit(1)
    row = connection.execute(query).mappings().first()
    return None if row is None else RoundRow(**row)


def last_versions(connection: Connection, run_id: str, most: int) -> list[Version]:
    """The last rounds of a run that gave new global tensors, at most so many, in order."""
    query = (
        sa.select(rounds.c.base_digest, rounds.c.result_digest, rounds.c.snapshot)
        .where(rounds.c.run_id == run_id, rounds.c.kind == "train", rounds.c.state == "published")
        .order_by(rounds.c.round.desc())
        .limit(most)
    )
    found = [
        Version(base, result, s.get("result_state", "")) for base, result, s in connection.execute(query)
    ]
    return found[::-1]


def list_rounds(connection: Connection, run_id: str) -> list[RoundRow]:
    """All rounds of a run in order."""
    query = sa.select(rounds).where(rounds.c.run_id == run_id).order_by(rounds.c.round)
    return [RoundRow(**row) for row in connection.execute(query).mappings()]


def insert_submissions(connection: Connection, accepted: Sequence[Submission]) -> None:
    """Store accepted submissions; the primary key makes a second one with the same key impossible."""
    connection.execute(sa.insert(submissions), [_values(submission) for submission in accepted])


def find_submission(connection: Connection, run_id: str, attempt_id: str) -> Submission | None:
    """The accepted submission of an attempt, in whatever round it counted."""
    query = sa.select(submissions).filter_by(run_id=run_id, attempt_id=attempt_id)
    row = connection.execute(query).mappings().first()
    return None if row is None else Submission(**row)


def list_submissions(
    connection: Connection, run_id: str, round_number: int | None = None
) -> list[Submission]:
    """Accepted submissions of a run, or of one of its rounds, in order of arrival."""
    query = sa.select(submissions).where(submissions.c.run_id == run_id).order_by(submissions.c.received_ns)
    if round_number is not None:
        query = query.where(submissions.c.round == round_number)
    return [Submission(**row) for row in connection.execute(query).mappings()]


def _values(record: RunRow | RoundRow | Submission) -> dict[str, object]:
    """Column values; not copied deeply, unlike ``dataclasses.asdict``."""
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}
