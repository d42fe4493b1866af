"""Devices that ask for work: who asked lately, and who waits right now. Nothing polls the database."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable

__all__ = ["WaitingRoom"]


class WaitingRoom:
    """One event a waiting device.

    Args:
        recent_s: a device that asked within this time counts as connected.
    """

    def __init__(self, recent_s: float) -> None:
        self._recent_s = recent_s
        self._asked: dict[str, float] = {}
        self._events: dict[str, asyncio.Event] = {}
        self._waiting: Counter[str] = Counter()

    def note(self, device_id: str) -> None:
        """A device asks now."""
        self._asked[device_id] = time.monotonic()

    def connected(self) -> set[str]:
        """Devices that wait, or asked lately."""
        since = time.monotonic() - self._recent_s
        self._asked = {device: at for device, at in self._asked.items() if at >= since}
        return set(self._asked) | set(self._waiting)

    def wake(self, devices: Iterable[str]) -> None:
        """Let these devices look again."""
        for device_id in devices:
            event = self._events.get(device_id)
            if event is not None:
                event.set()

    def wake_all(self) -> None:
        """Let everybody look again."""
        self.wake(tuple(self._events))

    async def wait(self, device_id: str, timeout_s: float) -> None:
        """Return when woken, or after the time."""
        event = self._events.setdefault(device_id, asyncio.Event())
        event.clear()
        self._waiting[device_id] += 1
        try:
            await asyncio.wait_for(event.wait(), timeout_s)
        except TimeoutError:
            pass
        finally:
            self.note(device_id)
            self._waiting[device_id] -= 1
            if self._waiting[device_id] <= 0:
                del self._waiting[device_id]
                self._events.pop(device_id, None)
