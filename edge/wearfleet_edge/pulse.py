"""Signs of life while a task is computed: often enough to keep its lease, and to notice that nobody wants it now."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from wearfleet_protos.errors import TransportError

from wearfleet_edge.transport.cloud import Stage

if TYPE_CHECKING:
    from wearfleet_edge.trainer import Limits
    from wearfleet_edge.transport.cloud import Cloud, Task

__all__ = ["Pulse"]

_SHARE_OF_LEASE: Final = 1 / 3
_LONGEST_SECONDS: Final = 60.0


class Pulse:
    """Reports the progress of one task between its steps.

    A report that fails changes nothing: the work may still be handed in when the network is back.

    Args:
        cloud: the service.
        task: what is being computed.
        limits: of the computation.
    """

    def __init__(self, cloud: Cloud, task: Task, limits: Limits) -> None:
        self._cloud, self._task, self._limits = cloud, task, limits
        lease_s = task.lease_s or float("inf")
        self._every_s = min(_SHARE_OF_LEASE * lease_s, _LONGEST_SECONDS)
        self._next = limits.monotonic() + self._every_s
        self.unwanted = False

    def limits(self) -> Limits:
        """The same limits, and an end when the service wants the work no more."""
        return replace(self._limits, stopped=self._stopped)

    def _stopped(self) -> bool:
        if self._limits.monotonic() >= self._next:
            self._next = self._limits.monotonic() + self._every_s
            with suppress(TransportError):
                self.unwanted = not self._cloud.report_stage(self._task, Stage.TRAINING)
        return self.unwanted or self._limits.stopped()
