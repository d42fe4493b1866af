"""One federated round as plain values: what it has, where it stands, and how that is stored."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Final

from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.tensors import Digest

__all__ = ["TERMINAL", "Receipt", "Round", "RoundPolicy", "RoundState"]


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
        deadline_s: time for the clients, from the invitation.
        extension_s: added once when the quorum is missed at the deadline; 0 for none.

    Raises:
        ProtocolError: a number is out of range.
    """

    quorum: int = 1
    min_examples: int = 1
    deadline_s: float = 300.0
    extension_s: float = 0.0

    def __post_init__(self) -> None:
        if self.quorum < 1 or self.min_examples < 1 or self.deadline_s <= 0 or self.extension_s < 0:
            raise ProtocolError(f"round policy is out of range: {self}")


@dataclass(frozen=True, slots=True)
class Receipt:
    """One accepted update."""

    client: str
    attempt: str
    digest: Digest
    num_examples: int
    num_steps: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """Everything about one round; plain values only, so that it can be stored.

    Args:
        run_id: the federation run.
        number: from 1.
        base: digest of the global tensors that the clients start from.
        policy: when it has enough.
        state: where it stands.
        invited: sorted; the only clients whose updates count.
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

    def accepted(self, client: str) -> Receipt | None:
        """The update of a client that counts, if there is one."""
        return next((r for r in self.receipts if r.client == client), None)

    @property
    def has_quorum(self) -> bool:
        """Enough updates and enough windows for an average."""
        examples = sum(r.num_examples for r in self.receipts)
        return len(self.receipts) >= self.policy.quorum and examples >= self.policy.min_examples

    def to_dict(self) -> dict[str, object]:
        """Values that JSON can hold; inverse of ``from_dict``."""
        values: dict[str, object] = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"policy": asdict(self.policy), "receipts": [_plain(r) for r in self.receipts]}

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
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"stored round cannot be read: {error}") from error


def _plain(receipt: Receipt) -> dict[str, object]:
    return {field.name: getattr(receipt, field.name) for field in fields(receipt)}
