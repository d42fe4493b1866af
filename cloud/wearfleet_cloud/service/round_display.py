"""The present round on the live page: many changes at once are shown once."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

from wearfleet_cloud.service.live import FinishedRound, LiveState
from wearfleet_cloud.service.round_keeper import RoundKeeper
from wearfleet_cloud.service.round_view import accuracy, finished_round, round_view
from wearfleet_cloud.service.run_context import ActiveRun
from wearfleet_cloud.storage.run_records import RoundRow

__all__ = ["RoundDisplay"]

_SHOW_S: Final = 0.1


class RoundDisplay:
    """Tells the live page.

    Args:
        live: its state.
        present: the run and its newest round, or None.
    """

    def __init__(self, live: LiveState, present: Callable[[], tuple[ActiveRun, RoundKeeper] | None]) -> None:
        self._live, self._present = live, present
        self._history: tuple[FinishedRound, ...] = ()
        self._timer: asyncio.TimerHandle | None = None

    def soon(self) -> None:
        """Show the present round within a tenth of a second."""
        loop = asyncio.get_running_loop()
        if self._timer is None or self._timer.when() <= loop.time():
            self._timer = loop.call_later(_SHOW_S, self.now)

    def now(self) -> None:
        """Show the present round."""
        present = self._present()
        if present is None:
            return
        run, keeper = present
        view = round_view(
            run,
            keeper.round,
            keeper.kind,
            stages=keeper.stages,
            submissions=keeper.submissions,
            history=self._history,
        )
        self._live.on_round(view)
        for device_id, submission in keeper.submissions.items():
            base = accuracy(submission.metrics, "base")
            if base is not None:
                self._live.on_accuracy(device_id, base, accuracy(submission.metrics, "evaluate_after"))

    def adopt(self, keepers: Sequence[RoundKeeper], rows: Sequence[RoundRow]) -> None:
        """The rounds so far of a run that is taken up."""
        self._history = tuple(
            finished_round(k.round.number, k.submissions, ((r.closed_ns or r.opened_ns) - r.opened_ns) * 1e-9)
            for k, r in zip(keepers, rows, strict=True)
            if k.closed and k.kind == "train"
        )

    def close(self, keeper: RoundKeeper) -> float:
        """A round is over; returns how long it took, seconds."""
        seconds = (time.time_ns() - keeper.opened_ns) * 1e-9
        if keeper.kind == "train":
            finished = finished_round(keeper.round.number, keeper.submissions, seconds)
            self._history = (*self._history, finished)
        self.now()
        return seconds

    def stop(self) -> None:
        """Show nothing more."""
        if self._timer is not None:
            self._timer.cancel()
