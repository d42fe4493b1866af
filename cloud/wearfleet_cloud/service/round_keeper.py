"""One round under way: the state machine's value, its row in the database, and what the page shows of it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from sqlalchemy.engine import Connection
from wearfleet_protos.tensors import Digest

from wearfleet_cloud.federated.round import TERMINAL, Round, RoundState, advance, next_round
from wearfleet_cloud.federated.round_events import Effect, Event
from wearfleet_cloud.service.live import Stage
from wearfleet_cloud.service.run_context import ActiveRun, RoundKind, attempt_id_for
from wearfleet_cloud.storage.run_records import RoundRow, Submission, save_round

__all__ = ["RoundKeeper", "first_round", "kept_round", "successor"]


@dataclass(slots=True)
class RoundKeeper:
    """The present round; changed by one coordinator only."""

    round: Round
    kind: RoundKind
    opened_ns: int
    bytes_down: int = 0
    bytes_up: int = 0
    stages: dict[str, Stage] = field(default_factory=dict)
    submissions: dict[str, Submission] = field(default_factory=dict)

    @property
    def closed(self) -> bool:
        """True when nothing can change any more."""
        return self.round.state in TERMINAL

    @property
    def wants_clients(self) -> bool:
        """Whether the round has no clients yet, or free slots for more."""
        planned = self.round.state == RoundState.PLANNED
        return planned or (self.kind == "train" and self.round.free_slots > 0)

    def open_for(self, device_id: str) -> bool:
        """True when this device is invited and has not answered."""
        current = self.round
        invited = current.state == RoundState.RUNNING and device_id in current.invited
        return invited and device_id not in current.answered

    def takes_update(self, device_id: str) -> bool:
        """True while an update of this device would count; also after a refused one, or a task turned down."""
        current = self.round
        running = current.state == RoundState.RUNNING and device_id in current.invited
        return running and current.accepted(device_id) is None

    def after(self, event: Event) -> tuple[Round, tuple[Effect, ...]]:
        """What an event would make of the round; nothing is changed."""
        return advance(self.round, event, time.time())

    def row(self, current: Round) -> RoundRow:
        """The row of a value of this round."""
        return RoundRow(
            run_id=current.run_id,
            round=current.number,
            kind=self.kind,
            state=str(current.state),
            base_digest=current.base,
            opened_ns=self.opened_ns,
            snapshot=current.to_dict(),
            result_digest=current.result or None,
            closed_ns=time.time_ns() if current.state in TERMINAL else None,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
        )

    def save(self, current: Round) -> Callable[[Connection], None]:
        """Work that stores a value of this round."""
        row = self.row(current)
        return lambda connection: save_round(connection, row)


def first_round(run: ActiveRun) -> RoundKeeper:
    """Round 1, from the start values of the run."""
    start = Digest(run.row.tensors_digest)
    return RoundKeeper(Round(run.run_id, 1, start, run.settings.policy), "train", time.time_ns())


def kept_round(row: RoundRow, submissions: Iterable[Submission]) -> RoundKeeper:
    """A round as it was stored.

    Raises:
        ProtocolError: the row cannot be read.
    """
    kind: RoundKind = "personalise" if row.kind == "personalise" else "train"
    keeper = RoundKeeper(Round.from_dict(row.snapshot), kind, row.opened_ns, row.bytes_down, row.bytes_up)
    keeper.submissions = {submission.device_id: submission for submission in submissions}
    return keeper


def successor(run: ActiveRun, closed: Round, kind: RoundKind) -> RoundKeeper | None:
    """The round after a closed one; None when the run is over.

    A round that gave no model counts too: its number is used up, and the next one starts from the same tensors.
    """
    following = next_round(closed, lambda number, client: attempt_id_for(run.run_id, number, client))
    if closed.state == RoundState.ABORTED or kind == "personalise":
        return None
    if following.number <= run.settings.rounds:
        return RoundKeeper(following, "train", time.time_ns())
    if not run.settings.personalise:
        return None
    policy = replace(  # nothing is averaged, and an update that comes now is too late
        run.settings.policy, quorum=1, min_examples=1, extension_s=0.0, max_staleness=None
    )
    last = replace(following, policy=policy, carried=())
    return RoundKeeper(last, "personalise", time.time_ns())
