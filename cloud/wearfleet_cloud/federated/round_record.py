"""One federated round as plain values: what it has, where it stands, and how that is stored."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, Final

from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.tensors import Digest

from wearfleet_cloud.federated.robust.evidence import Judgement

__all__ = ["TERMINAL", "Carried", "Receipt", "Round", "RoundPolicy", "RoundState", "next_round"]


class RoundState(StrEnum):
    """Where a round stands."""

    PLANNED = "planned"
    RUNNING = "running"
    AGGREGATING = "aggregating"
    PUBLISHED = "published"
    SKIPPED = "skipped"
    ABORTED = "aborted"


TERMINAL: Final = frozenset({RoundState.PUBLISHED, RoundState.SKIPPED, RoundState.ABORTED})


@dataclass(frozen=True, slots=True)
class RoundPolicy:
    """When a round has enough, and how long it waits.

    Args:
        quorum: fewest updates worth averaging, >= 1.
        min_examples: fewest training windows of all updates together.
        deadline_s: time for the clients, from the invitation; in a buffered round, from when one gets its task.
        extension_s: added once when the quorum is missed at the deadline; 0 for none.
        max_staleness: None for synchronous rounds. Otherwise a round is a buffer (ADR 11): who is still at work when
            it is full goes on, and its update counts in a later buffer if the model is at most so many versions newer.

    Raises:
        ProtocolError: a number is out of range.
    """

    quorum: int = 1
    min_examples: int = 1
    deadline_s: float = 300.0
    extension_s: float = 0.0
    max_staleness: int | None = None

    def __post_init__(self) -> None:
        if self.quorum < 1 or self.min_examples < 1 or self.deadline_s <= 0 or self.extension_s < 0:
            raise ProtocolError(f"round policy is out of range: {self}")
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ProtocolError(f"max_staleness must be at least 0, got {self.max_staleness}")

    @property
    def buffered(self) -> bool:
        """True when rounds are buffers of asynchronous updates."""
        return self.max_staleness is not None


@dataclass(frozen=True, slots=True)
class Receipt:
    """One accepted update; ``base`` is empty when it started from the round's own base, and ``staleness`` 0 then."""

    client: str
    attempt: str
    digest: Digest
    num_examples: int
    num_steps: int = 0
    staleness: int = 0
    base: str = ""


@dataclass(frozen=True, slots=True)
class Carried:
    """A client that is still at work on the task of a round before.

    Args:
        client: identity.
        attempt: of that task.
        base: global tensors that it started from.
        staleness: versions that the model has gone on since then.
    """

    client: str
    attempt: str
    base: Digest
    staleness: int


@dataclass(frozen=True, slots=True)
class Round:
    """Everything about one round; plain values only, so that it can be stored.

    Args:
        run_id: the federation run.
        number: from 1.
        base: digest of the global tensors that the clients start from.
        policy: when it has enough.
        state: where it stands.
        invited: sorted; the only clients whose updates count; with those carried over, and those who came later.
        wanted: updates after which it does not wait longer.
        fetched: clients that were given their task.
        declined: client -> reason.
        rejected: client -> reason, of updates that could not be used.
        receipts: accepted updates, in order of arrival.
        deadline: Unix seconds; 0 before the invitation.
        extended: the one extension was used.
        result: digest of the new global tensors; empty unless published.
        reason: why it was skipped or aborted.
        base_state: digest of what the strategy kept on the server before it; empty for nothing.
        result_state: the same after it; empty unless published.
        slots: clients that are to be at work at the same time.
        lost: invited clients that gave no sign of life for too long; one that comes back is taken out.
        carried: invited clients that work on the task of a round before; in buffered rounds only.
        judged: what a robust rule said of clients: all but those that it counted as they were and found inconspicuous.
    """

    run_id: str
    number: int
    base: Digest
    policy: RoundPolicy
    state: RoundState = RoundState.PLANNED
    invited: tuple[str, ...] = ()
    wanted: int = 0
    fetched: tuple[str, ...] = ()
    declined: tuple[tuple[str, str], ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    receipts: tuple[Receipt, ...] = ()
    deadline: float = 0.0
    extended: bool = False
    result: str = ""
    reason: str = ""
    base_state: str = ""
    result_state: str = ""
    slots: int = 0
    lost: tuple[str, ...] = ()
    carried: tuple[Carried, ...] = ()
    judged: tuple[Judgement, ...] = ()

    def accepted(self, client: str) -> Receipt | None:
        """The update of a client that counts, if there is one."""
        return next((r for r in self.receipts if r.client == client), None)

    def carried_task(self, client: str) -> Carried | None:
        """The task of a round before that a client is still at work on, if there is one."""
        return next((c for c in self.carried if c.client == client), None)

    @property
    def answered(self) -> frozenset[str]:
        """Clients that have nothing more to say, unless they change their mind."""
        receipts = {r.client for r in self.receipts}
        return frozenset(receipts | dict(self.declined).keys() | dict(self.rejected).keys())

    @property
    def at_work(self) -> tuple[str, ...]:
        """Clients that may still answer."""
        gone = self.answered | set(self.lost)
        return tuple(client for client in self.invited if client not in gone)

    @property
    def free_slots(self) -> int:
        """Clients that may be invited now: for lost ones, and in a buffered round for those who have answered."""
        if self.state != RoundState.RUNNING:
            return 0
        taken = len(self.at_work) if self.policy.buffered else len(self.invited) - len(self.lost)
        return max(0, self.slots - taken)

    @property
    def has_quorum(self) -> bool:
        """Enough updates and enough windows for an average."""
        examples = sum(r.num_examples for r in self.receipts)
        return len(self.receipts) >= self.policy.quorum and examples >= self.policy.min_examples

    def to_dict(self) -> dict[str, object]:
        """Values that JSON can hold; inverse of ``from_dict``."""
        values: dict[str, object] = {field.name: getattr(self, field.name) for field in fields(self)}
        lists = {name: [_plain(r) for r in getattr(self, name)] for name in ("receipts", "carried", "judged")}
        return values | {"policy": asdict(self.policy), **lists}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> "Round":
        """A round as it was stored.

        Raises:
            ProtocolError: not a stored round.
        """
        try:
            return Round(
                **{
                    **stored,
                    "policy": RoundPolicy(**stored["policy"]),
                    "state": RoundState(stored["state"]),
                    "invited": tuple(stored["invited"]),
                    "fetched": tuple(stored["fetched"]),
                    "declined": tuple((c, r) for c, r in stored["declined"]),
                    "rejected": tuple((c, r) for c, r in stored["rejected"]),
                    "receipts": tuple(Receipt(**r) for r in stored["receipts"]),
                    "lost": tuple(stored.get("lost", ())),
                    "carried": tuple(Carried(**c) for c in stored.get("carried", ())),
                    "judged": tuple(Judgement.from_dict(j) for j in stored.get("judged", ())),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"stored round cannot be read: {error}") from error


def next_round(closed: Round, attempt_of: Callable[[int, str], str]) -> Round:
    """The planned round after a closed one; in a buffered run with the clients that are still at work.

    Args:
        closed: published or skipped.
        attempt_of: attempt of a client's task in a round with this number.
    """
    published = closed.state == RoundState.PUBLISHED
    return Round(
        closed.run_id,
        closed.number + 1,
        Digest(closed.result) if published else closed.base,
        closed.policy,
        base_state=closed.result_state if published else closed.base_state,
        carried=_carried_over(closed, attempt_of, int(published)),
    )


def _carried_over(closed: Round, attempt_of: Callable[[int, str], str], versions: int) -> tuple[Carried, ...]:
    """Clients at work, ``versions`` later; those that are too far behind then, or never began, are let go."""
    if closed.policy.max_staleness is None:
        return ()
    carried = []
    for client in closed.at_work:
        before = closed.carried_task(client)
        if before is None and client in closed.fetched:
            before = Carried(client, attempt_of(closed.number, client), closed.base, 0)
        if before is not None and before.staleness + versions <= closed.policy.max_staleness:
            carried.append(replace(before, staleness=before.staleness + versions))
    return tuple(carried)


def _plain(record: Receipt | Carried) -> dict[str, object]:
    return {field.name: getattr(record, field.name) for field in fields(record)}
