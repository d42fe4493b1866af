"""Which devices robust rules and checks keep pointing at: for operators, who decide what to do about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from wearfleet_cloud.federated.robust.evidence import Judgement
from wearfleet_cloud.federated.round_record import Round
from wearfleet_cloud.storage.audit import append_audit
from wearfleet_cloud.storage.tables import rounds

__all__ = ["LAST_ROUNDS", "QUARANTINE_AFTER", "Suspicion", "list_suspicions", "note_suspects"]

LAST_ROUNDS: Final = 10
QUARANTINE_AFTER: Final = 3
_ENDED: Final = ("published", "skipped")
_MOST_READ: Final = 200
"""Newest training rounds that are looked through."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """How often a device was pointed at.

    Args:
        suspect: rounds in which its update was refused, or lay far from all others.
        rounds: its last rounds, at most ``LAST_ROUNDS``, in which it handed something in.
        reason: of the newest of them; empty for none.
    """

    suspect: int
    rounds: int
    reason: str = ""

    @property
    def advised(self) -> bool:
        """Whether an operator should think of a quarantine: suspect in ``QUARANTINE_AFTER`` rounds or more."""
        return self.suspect >= QUARANTINE_AFTER

    @property
    def evidence(self) -> str:
        """In words; empty for none."""
        return f"suspect in {self.suspect} of {self.rounds} rounds: {self.reason}" if self.suspect else ""


def list_suspicions(connection: Connection) -> dict[str, Suspicion]:
    """For every device that handed in an update lately, whatever the run."""
    newest = (
        sa.select(rounds.c.snapshot)
        .where(rounds.c.kind == "train", rounds.c.state.in_(_ENDED))
        .order_by(rounds.c.opened_ns.desc())
        .limit(_MOST_READ)
    )
    found: dict[str, Suspicion] = {}
    for snapshot in connection.execute(newest).scalars():
        reasons = _reasons(snapshot)
        for device_id in {r["client"] for r in snapshot["receipts"]} | reasons.keys():
            before = found.get(device_id, Suspicion(0, 0))
            if before.rounds < LAST_ROUNDS:
                suspect = before.suspect + (device_id in reasons)
                reason = before.reason or reasons.get(device_id, "")
                found[device_id] = Suspicion(suspect, before.rounds + 1, reason)
    return found


def note_suspects(current: Round, judged: Sequence[Judgement], now_ns: int) -> Callable[[Connection], None]:
    """Work that puts the suspects of a round into the audit log."""

    def work(connection: Connection) -> None:
        for judgement in judged:
            if judgement.suspect:
                detail = (
                    f"round {current.number} of {current.run_id}: {judgement.verdict}; {judgement.reason}"
                )
                append_audit(connection, now_ns, "federation.suspect", judgement.client, detail)

    return work


def _reasons(snapshot: Mapping[str, Any]) -> dict[str, str]:
    """Why each device of a round was pointed at: by the service when the update came, or by the rule."""
    judged = {j["client"]: j["reason"] for j in snapshot.get("judged", ()) if j["suspect"]}
    return {**dict(snapshot["rejected"]), **judged}
