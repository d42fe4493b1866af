"""The fleet as it is now, in memory: what the live page and its JSON interface show.

Pure data. Nothing here reads a clock that was not given, a file or a network; everything is bounded. All
calls come from one asyncio loop.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from wearfleet_protos.errors import NotFoundError, ProtocolError

from .fleet_view import MAX_ROUNDS, DeviceRow, FinishedRound, Json, Participant, RoundView, Stage
from .ribbon import RIBBON_LENGTH, Ribbon, RibbonCell

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "MAX_ACTIVITIES",
    "MAX_DEVICES",
    "MAX_ROUNDS",
    "DeviceRow",
    "FinishedRound",
    "LiveState",
    "Participant",
    "RibbonCell",
    "RoundView",
    "Stage",
]

MAX_DEVICES: Final = 1024
MAX_ACTIVITIES: Final = 64
_MAX_NAME: Final = 60
_RATE_SECONDS: Final = 10
_SECOND_NS: Final = 1_000_000_000
_ONLINE_NS: Final = 30 * _SECOND_NS


class LiveState:
    """The picture of the fleet; each change raises ``version``.

    A window that came in the last 30 seconds means that its device is online; a status message says so too,
    and only a status message says that it is not. The model of a row is that of its newest window.

    After a restart, call the same methods with what the database holds and the times it holds.

    Args:
        source_name: data set or simulator behind the streams, shown as a badge; "" for plain devices.
        simulated: True when the streams are simulated; always shown.
        clock_ns: nanoseconds since 1970, for calls that give no time.
        ribbon_length: cells kept for a device.
    """

    def __init__(
        self,
        source_name: str = "",
        *,
        simulated: bool = False,
        clock_ns: Callable[[], int] = time.time_ns,
        ribbon_length: int = RIBBON_LENGTH,
    ) -> None:
        self.version = 0
        self.source_name = source_name
        self.simulated = simulated
        self.ribbon_length = ribbon_length
        self.round: RoundView | None = None
        self._round_version = 0
        self._removed_version = 0
        self._clock_ns = clock_ns
        self._rows: dict[str, DeviceRow] = {}
        self._row_versions: dict[str, int] = {}
        self._legend: dict[str, int] = {}
        self._arrivals: dict[int, int] = {}
        self._event = asyncio.Event()

    @property
    def legend(self) -> tuple[str, ...]:
        """Every activity name seen, in the order of first appearance; its place is its colour."""
        return tuple(self._legend)

    @property
    def devices(self) -> Mapping[str, DeviceRow]:
        """All rows by device, in the order of first appearance."""
        return MappingProxyType(self._rows)

    @property
    def now_ns(self) -> int:
        """The time by this picture's clock."""
        return self._clock_ns()

    def device(self, device_id: str) -> DeviceRow:
        """One row.

        Raises:
            NotFoundError: the device was never seen, or was removed.
        """
        try:
            return self._rows[device_id]
        except KeyError:
            raise NotFoundError(f"no device {device_id!r}: {len(self._rows)} devices are known") from None

    def snapshot(self) -> Json:
        """Everything, for JSON: a delta since before the first version."""
        return self.delta(-1)

    def delta(self, since: int) -> Json:
        """What changed after version ``since``, for JSON.

        Args:
            since: the version that the reader has; a negative one, one from the future or one before a device
                was removed gives everything.

        Returns:
            ``version`` of the picture, ``since`` (-1: everything is here, forget the rest), ``time_ms``,
            ``fleet``, ``legend``, the changed ``devices`` with their new cells, and ``round`` if it
            changed.
        """
        start = since if self._removed_version <= since <= self.version else -1
        changed = [row for name, row in self._rows.items() if self._row_versions[name] > start]
        picture: Json = {
            "version": self.version,
            "since": start,
            "time_ms": self.now_ns // 1_000_000,
            "fleet": self._fleet_json(),
            "legend": list(self._legend),
            "devices": [row.as_json(self._legend, start) for row in changed],
        }
        if self._round_version > start:
            picture["round"] = self.round_json()
        return picture

    def round_json(self) -> Json | None:
        """The federated run for JSON, None when there is none."""
        names = {name: row.display_name for name, row in self._rows.items()}
        return None if self.round is None else self.round.as_json(names)

    def device_json(self, device_id: str) -> Json:
        """One device with its whole ribbon, for JSON.

        Raises:
            NotFoundError: the device was never seen, or was removed.
        """
        return self.device(device_id).as_json(self._legend)

    def windows_per_second(self) -> float:
        """Windows that came in the last ten seconds, per second (per second of life in the first ten)."""
        second = self.now_ns // _SECOND_NS
        recent = {at: count for at, count in self._arrivals.items() if 0 <= second - at < _RATE_SECONDS}
        if not recent:
            return 0.0
        older = len(recent) < len(self._arrivals)
        span = _RATE_SECONDS if older else min(_RATE_SECONDS, second - min(recent) + 1)
        return sum(recent.values()) / span

    async def changed(self, since: int) -> int:
        """Wait until ``version`` exceeds ``since``, then return it."""
        while self.version <= since:
            await self._event.wait()
        return self.version

    def on_prediction(
        self,
        device_id: str,
        display_name: str,
        cell: RibbonCell,
        model_version: int,
        labels: Sequence[str],
        *,
        model_id: str = "",
        personalised: bool = False,
        now_ns: int | None = None,
    ) -> bool:
        """Note one recognised window.

        Args:
            device_id: who recognised it.
            display_name: how the page calls the device.
            cell: the window.
            model_version: version of the model that recognised it.
            labels: that model's activities.
            model_id: that model.
            personalised: True when the model carries weights of this wearer.
            now_ns: when it came; the clock's time when left out.

        Returns:
            False when this window was noted before (it is counted as a duplicate and changes nothing else).

        Raises:
            ProtocolError: the activity is not among the labels, or there are too many different activities.
        """
        if cell.activity >= len(labels):
            raise ProtocolError(
                f"activity {cell.activity} does not exist: the model has {len(labels)} labels"
            )
        self._learn(labels)
        at_ns = self.now_ns if now_ns is None else now_ns
        row = self._row(device_id)
        fresh = row.ribbon.add(cell, labels[cell.activity], self.version + 1)
        if fresh:
            self._count_arrival(at_ns)
        if fresh and row.ribbon.last is not None and row.ribbon.last.cell is cell:
            row = replace(
                row,
                display_name=display_name[:_MAX_NAME] or row.display_name,
                model_id=model_id,
                model_version=model_version,
                labels=tuple(labels),
                personalised=personalised,
            )
        online = row.online or self.now_ns - at_ns < _ONLINE_NS
        self._store(replace(row, online=online, last_seen_ns=max(row.last_seen_ns, at_ns)))
        return fresh

    def on_status(self, device_id: str, online: bool, now_ns: int, *, display_name: str = "") -> None:
        """Note that a device came (birth) or went (last will); an unknown device gets a row."""
        row = self._row(device_id)
        name = display_name[:_MAX_NAME] or row.display_name
        seen = max(row.last_seen_ns, now_ns) if online else row.last_seen_ns
        self._store(replace(row, online=online, display_name=name, last_seen_ns=seen))

    def on_health(
        self,
        device_id: str,
        *,
        now_ns: int,
        outbox_depth: int = 0,
        inference_ms: float | None = None,
    ) -> None:
        """Note what a device says of itself: windows waiting in its outbox, median time of one inference."""
        row = self._row(device_id)
        seen = max(row.last_seen_ns, now_ns)
        self._store(replace(row, last_seen_ns=seen, outbox_depth=outbox_depth, inference_ms=inference_ms))

    def on_accuracy(self, device_id: str, before: float | None, after: float | None) -> None:
        """Note a device's accuracy on its held-out windows, before and after local training, in [0, 1]."""
        self._store(replace(self._row(device_id), accuracy_before=before, accuracy_after=after))

    def on_round(self, view: RoundView) -> None:
        """Note the state of the federated run.

        A participant's accuracies go to its row once both are there, so that a row never pairs two rounds.
        """
        for device_id, who in view.participants.items():
            if who.accuracy_before is not None and who.accuracy_after is not None:
                self.on_accuracy(device_id, who.accuracy_before, who.accuracy_after)
        self.round = view
        self._round_version = self.version + 1
        self._bump()

    def on_source(self, name: str, *, simulated: bool) -> None:
        """Note which data is behind the streams."""
        self.source_name, self.simulated = name, simulated
        self._bump()

    def on_removed(self, device_id: str) -> None:
        """Forget a device (revoked); nothing happens when it is not known."""
        if device_id in self._rows:
            self._forget(device_id)
            self._bump()

    def _fleet_json(self) -> Json:
        online = [row for row in self._rows.values() if row.online]
        return {
            "source_name": self.source_name,
            "simulated": self.simulated,
            "devices": len(self._rows),
            "online": len(online),
            "ribbon_length": self.ribbon_length,
            "windows_per_s": round(self.windows_per_second(), 2),
            "model_versions": sorted({row.model_version for row in online if row.labels}),
        }

    def _learn(self, labels: Sequence[str]) -> None:
        unknown = [label for label in labels if label not in self._legend]
        if len(self._legend) + len(unknown) > MAX_ACTIVITIES:
            raise ProtocolError(f"the page shows at most {MAX_ACTIVITIES} different activities")
        for label in unknown:
            self._legend.setdefault(label, len(self._legend))

    def _row(self, device_id: str) -> DeviceRow:
        known = self._rows.get(device_id)
        return known or DeviceRow(device_id, device_id[:_MAX_NAME], ribbon=Ribbon(self.ribbon_length))

    def _store(self, row: DeviceRow) -> None:
        if row.device_id not in self._rows and len(self._rows) >= MAX_DEVICES:
            self._forget(min(self._rows.values(), key=lambda other: other.last_seen_ns).device_id)
        self._rows[row.device_id] = row
        self._row_versions[row.device_id] = self.version + 1
        self._bump()

    def _forget(self, device_id: str) -> None:
        del self._rows[device_id], self._row_versions[device_id]
        self._removed_version = self.version + 1

    def _count_arrival(self, at_ns: int) -> None:
        second = at_ns // _SECOND_NS
        self._arrivals[second] = self._arrivals.get(second, 0) + 1
        if len(self._arrivals) > 2 * _RATE_SECONDS:
            del self._arrivals[min(self._arrivals)]

    def _bump(self) -> None:
        self.version += 1
        self._event.set()
        self._event = asyncio.Event()
