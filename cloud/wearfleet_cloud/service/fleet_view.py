"""The values that make up the picture of the fleet: a row for a device, a view of the federated run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from .ribbon import PlacedCell, Ribbon

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MAX_ROUNDS", "DeviceRow", "FinishedRound", "Json", "Participant", "RoundView", "Stage"]

Json = dict[str, object]
"""An object of JSON: strings, numbers, booleans, None, lists and objects."""

MAX_ROUNDS: Final = 200


class Stage(StrEnum):
    """How far one device has come in the running round."""

    INVITED = "invited"
    FETCHED = "fetched"
    TRAINING = "training"
    SUBMITTED = "submitted"
    DECLINED = "declined"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class Participant:
    """One device in a round.

    Args:
        stage: how far it has come.
        accuracy_before: share of its held-out windows that the model it received gets right, in [0, 1].
        accuracy_after: the same after its local training.
    """

    stage: Stage
    accuracy_before: float | None = None
    accuracy_after: float | None = None


@dataclass(frozen=True, slots=True)
class FinishedRound:
    """What is kept of a finished round; accuracies are means over the devices that submitted, in [0, 1]."""

    number: int
    submitted: int
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RoundView:
    """The federated run: its current round and those that are done.

    Args:
        run_id: the run.
        strategy: name of the federated strategy.
        number: current round, counted from 1.
        rounds_total: rounds planned.
        state: state of the round's state machine, in words.
        deadline_ns: when the round ends at the latest, nanoseconds since 1970; None when nothing runs.
        participants: the invited devices, in the order in which they are drawn.
        history: finished rounds, oldest first; the last 200 are kept.
    """

    run_id: str
    strategy: str
    number: int
    rounds_total: int
    state: str
    deadline_ns: int | None = None
    participants: Mapping[str, Participant] = field(default_factory=dict)
    history: tuple[FinishedRound, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "participants", MappingProxyType(dict(self.participants)))
        object.__setattr__(self, "history", tuple(self.history)[-MAX_ROUNDS:])

    def as_json(self, names: Mapping[str, str]) -> Json:
        """The view for the page and its interface; ``names`` gives a device's display name."""
        return {
            "run_id": self.run_id,
            "strategy": self.strategy,
            "number": self.number,
            "rounds_total": self.rounds_total,
            "state": self.state,
            "deadline_ms": None if self.deadline_ns is None else self.deadline_ns // 1_000_000,
            "participants": [
                {
                    "id": device_id,
                    "name": names.get(device_id, device_id),
                    "stage": who.stage.value,
                    "accuracy_before": who.accuracy_before,
                    "accuracy_after": who.accuracy_after,
                }
                for device_id, who in self.participants.items()
            ],
            "history": [asdict(done) for done in self.history],
        }


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """One device as it is now; its ribbon is shared between the values that follow each other."""

    device_id: str
    display_name: str
    online: bool = False
    last_seen_ns: int = 0
    model_id: str = ""
    model_version: int = 0
    labels: tuple[str, ...] = ()
    personalised: bool = False
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    outbox_depth: int = 0
    inference_ms: float | None = None
    ribbon: Ribbon = field(default_factory=Ribbon)

    def as_json(self, legend: Mapping[str, int], since: int = -1) -> Json:
        """The row for the page and its interface.

        Args:
            legend: activity to its place in the legend.
            since: only cells that came after this version are in ``ribbon``.

        Returns:
            The fields by name; ``ribbon`` holds lists [start of the device, sequence, milliseconds since
            1970, place in the legend, confidence, OOD score, 1 when out of distribution].
        """
        last = self.ribbon.last
        return {
            "id": self.device_id,
            "name": self.display_name,
            "online": self.online,
            "last_seen_ms": self.last_seen_ns // 1_000_000,
            "model_id": self.model_id,
            "model_version": self.model_version,
            "personalised": self.personalised,
            "labels": list(self.labels),
            "activity": last.activity if last else None,
            "confidence": round(last.cell.confidence, 4) if last else None,
            "ood_score": round(last.cell.ood_score, 4) if last else None,
            "out_of_distribution": last.cell.out_of_distribution if last else False,
            "ood_rate": round(self.ribbon.ood_rate, 4),
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            "received": self.ribbon.received,
            "lost": self.ribbon.lost,
            "duplicated": self.ribbon.duplicated,
            "outbox_depth": self.outbox_depth,
            "inference_ms": self.inference_ms,
            "ribbon": [_cell_json(placed, legend) for placed in self.ribbon.since(since)],
        }


def _cell_json(placed: PlacedCell, legend: Mapping[str, int]) -> list[float]:
    cell = placed.cell
    return [
        *placed.order,
        cell.wall_time_ns // 1_000_000,
        legend[placed.activity],
        round(cell.confidence, 3),
        round(cell.ood_score, 3),
        int(cell.out_of_distribution),
    ]
