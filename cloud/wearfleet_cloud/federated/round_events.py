"""What happens to a federated round, and what the service must do about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from wearfleet_protos.tensors import Digest

from wearfleet_cloud.federated.robust.evidence import Judgement

__all__ = [
    "Aborted",
    "Aggregated",
    "AggregationFailed",
    "Answer",
    "AnswerStatus",
    "ArmDeadline",
    "ClientDeclined",
    "ClientReturned",
    "CohortSelected",
    "DeadlinePassed",
    "Effect",
    "Event",
    "InviteClients",
    "KeepModel",
    "Publish",
    "ReleaseClients",
    "SelectCohort",
    "ServiceRestarted",
    "SlotsGivenAway",
    "StartAggregation",
    "TaskFetched",
    "UpdateRejected",
    "UpdateSubmitted",
]


@dataclass(frozen=True, slots=True)
class CohortSelected:
    """The clients of the round are known; ``wanted`` updates are enough.

    Args:
        clients: who is invited beside those carried over.
        wanted: a buffered round may want more updates than there are clients yet.
        slots: clients that are to be at work at the same time; 0: as many as are invited.
    """

    clients: tuple[str, ...]
    wanted: int
    slots: int = 0


@dataclass(frozen=True, slots=True)
class TaskFetched:
    """A client has been given its task."""

    client: str


@dataclass(frozen=True, slots=True)
class UpdateSubmitted:
    """A client hands in an update whose tensors were checked and stored under ``digest``."""

    client: str
    attempt: str
    digest: Digest
    num_examples: int
    num_steps: int = 0


@dataclass(frozen=True, slots=True)
class UpdateRejected:
    """The tensors that a client handed in cannot be used (wrong shape, NaN, wrong base)."""

    client: str
    attempt: str
    reason: str


@dataclass(frozen=True, slots=True)
class ClientDeclined:
    """A client turns its task down."""

    client: str
    reason: str


@dataclass(frozen=True, slots=True)
class SlotsGivenAway:
    """Clients whose lease has run out are lost, and others are invited for free slots; either may be nobody."""

    lost: tuple[str, ...]
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClientReturned:
    """A client that was lost gives a sign of life: it takes part again, whoever was invited for it."""

    client: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The time of an ``ArmDeadline`` has come; one that is early or outdated changes nothing."""


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The new global tensors are stored under ``digest``, what the strategy keeps under ``state`` (empty: nothing)."""

    digest: Digest
    state: str = ""
    judged: tuple[Judgement, ...] = ()


@dataclass(frozen=True, slots=True)
class AggregationFailed:
    """No new global tensors could be made."""

    reason: str
    judged: tuple[Judgement, ...] = ()


@dataclass(frozen=True, slots=True)
class Aborted:
    """An operator ends the round."""

    reason: str


@dataclass(frozen=True, slots=True)
class ServiceRestarted:
    """The round was read back from the database; whatever was under way in memory is gone."""


Event = (
    CohortSelected
    | TaskFetched
    | UpdateSubmitted
    | UpdateRejected
    | ClientDeclined
    | SlotsGivenAway
    | ClientReturned
    | DeadlinePassed
    | Aggregated
    | AggregationFailed
    | Aborted
    | ServiceRestarted
)


class AnswerStatus(StrEnum):
    """What a client is told about its submission."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    STALE = "stale"
    CONFLICT = "conflict"
    REJECTED = "rejected"
    DENIED = "denied"


@dataclass(frozen=True, slots=True)
class SelectCohort:
    """Choose the clients (then report ``CohortSelected``)."""


@dataclass(frozen=True, slots=True)
class InviteClients:
    """Offer these clients their task."""

    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ArmDeadline:
    """Report ``DeadlinePassed`` at this time, Unix seconds."""

    at: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Tell a client what became of its submission or request."""

    client: str
    status: AnswerStatus
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StartAggregation:
    """Average the stored updates (client -> digest), then report ``Aggregated`` or ``AggregationFailed``."""

    updates: Mapping[str, Digest]


@dataclass(frozen=True, slots=True)
class Publish:
    """Make these tensors the global ones."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class KeepModel:
    """The round gave no model; the old one stays."""

    reason: str


@dataclass(frozen=True, slots=True)
class ReleaseClients:
    """Tell these clients that their work is not needed any more."""

    clients: tuple[str, ...]


Effect = (
    SelectCohort
    | InviteClients
    | ArmDeadline
    | Answer
    | StartAggregation
    | Publish
    | KeepModel
    | ReleaseClients
)
