"""What one device recognised lately: a bounded, ordered run of cells with exact counts.

Windows arrive late, twice or never. The ribbon keeps them in the order in which they were recorded, shows
each once, and counts what came, what came again and what is missing.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from wearfleet_protos.errors import ProtocolError

__all__ = ["RIBBON_LENGTH", "PlacedCell", "Ribbon", "RibbonCell", "SequenceLedger"]

RIBBON_LENGTH = 240
"""Cells kept for one device: about five minutes of windows of 2.56 s with half overlap."""

_MAX_SPANS = 256
_MAX_BOOTS = 8


@dataclass(frozen=True, slots=True)
class RibbonCell:
    """One recognised window.

    Args:
        sequence: number of the window since the device started, 0, 1, 2 ...; one more for each window.
        wall_time_ns: end of the window, nanoseconds since 1970 by the device's clock.
        activity: index into the labels of the model that recognised it.
        confidence: probability of that activity, in [0, 1].
        ood_score: how far the window lies from what the model has seen; larger is farther.
        out_of_distribution: True when the score exceeds the model's threshold.
        boot_id: which start of the device counted ``sequence``.

    Raises:
        ProtocolError: a negative number, a confidence outside [0, 1], or a score that is not finite.
    """

    sequence: int
    wall_time_ns: int
    activity: int
    confidence: float
    ood_score: float
    out_of_distribution: bool
    boot_id: str = ""

    def __post_init__(self) -> None:
        if self.sequence < 0 or self.wall_time_ns < 0 or self.activity < 0:
            raise ProtocolError(
                "a cell needs sequence, wall_time_ns and activity of 0 or more, "
                f"got {self.sequence}, {self.wall_time_ns} and {self.activity}"
            )
        if not 0.0 <= self.confidence <= 1.0:
            raise ProtocolError(f"a confidence lies in [0, 1], got {self.confidence}")
        if not math.isfinite(self.ood_score):
            raise ProtocolError(f"an OOD score is a finite number, got {self.ood_score}")


class SequenceLedger:
    """Which numbers of a counting sequence have come, as disjoint spans; memory is bounded.

    Beyond 256 spans the two oldest are joined: the numbers between them stay counted as missing for good.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._given_up = 0

    @property
    def missing(self) -> int:
        """Numbers between the first and the last seen that have not come (yet)."""
        gaps = zip(self._ends[:-1], self._starts[1:], strict=True)
        return self._given_up + sum(start - end - 1 for end, start in gaps)

    def add(self, number: int) -> bool:
        """Note one number; False when it was there already."""
        place = bisect_right(self._starts, number)
        if place and number <= self._ends[place - 1]:
            return False
        joins_left = place > 0 and self._ends[place - 1] == number - 1
        joins_right = place < len(self._starts) and self._starts[place] == number + 1
        if joins_left and joins_right:
            self._ends[place - 1] = self._ends.pop(place)
            del self._starts[place]
        elif joins_left:
            self._ends[place - 1] = number
        elif joins_right:
            self._starts[place] = number
        else:
            self._starts.insert(place, number)
            self._ends.insert(place, number)
            self._bound()
        return True

    def _bound(self) -> None:
        if len(self._starts) > _MAX_SPANS:
            self._given_up += self._starts[1] - self._ends[0] - 1
            del self._starts[1]
            del self._ends[0]


@dataclass(frozen=True, slots=True)
class PlacedCell:
    """A cell in its place.

    Args:
        order: (start of the device, sequence).
        cell: the cell.
        activity: name of the activity, by the labels of the model that recognised it.
        version: version of the picture in which it came.
    """

    order: tuple[int, int]
    cell: RibbonCell
    activity: str
    version: int


class Ribbon:
    """The latest cells of one device, in order of recording.

    The starts of a device are ordered by the first cell that came from each; the last eight starts are
    remembered.

    Args:
        length: how many cells are kept.
    """

    def __init__(self, length: int = RIBBON_LENGTH) -> None:
        self._length = length
        self._cells: list[PlacedCell] = []
        self._boots: dict[str, tuple[int, SequenceLedger]] = {}
        self._boots_seen = 0
        self._lost_before = 0
        self._flagged = 0
        self.received = 0
        self.duplicated = 0

    @property
    def cells(self) -> tuple[PlacedCell, ...]:
        """The kept cells, oldest first."""
        return tuple(self._cells)

    @property
    def last(self) -> PlacedCell | None:
        """The cell recorded last, if any came."""
        return self._cells[-1] if self._cells else None

    @property
    def lost(self) -> int:
        """Windows that are missing between those that came; falls when a late one arrives."""
        return self._lost_before + sum(ledger.missing for _, ledger in self._boots.values())

    @property
    def ood_rate(self) -> float:
        """Share of the kept cells that are out of distribution, 0 when there are none."""
        return self._flagged / len(self._cells) if self._cells else 0.0

    def add(self, cell: RibbonCell, activity: str, version: int) -> bool:
        """Put a cell in its place; False when it is a duplicate, which changes only ``duplicated``."""
        boot, ledger = self._boot(cell.boot_id)
        if not ledger.add(cell.sequence):
            self.duplicated += 1
            return False
        self.received += 1
        self._flagged += cell.out_of_distribution
        order = (boot, cell.sequence)
        place = bisect_left(self._cells, order, key=lambda placed: placed.order)
        self._cells.insert(place, PlacedCell(order, cell, activity, version))
        if len(self._cells) > self._length:
            self._flagged -= self._cells.pop(0).cell.out_of_distribution
        return True

    def since(self, version: int) -> tuple[PlacedCell, ...]:
        """The kept cells that came after ``version``, in order of recording."""
        return tuple(placed for placed in self._cells if placed.version > version)

    def _boot(self, boot_id: str) -> tuple[int, SequenceLedger]:
        known = self._boots.get(boot_id)
        if known is None:
            if len(self._boots) >= _MAX_BOOTS:
                oldest = next(iter(self._boots))
                self._lost_before += self._boots.pop(oldest)[1].missing
            known = self._boots[boot_id] = (self._boots_seen, SequenceLedger())
            self._boots_seen += 1
        return known
