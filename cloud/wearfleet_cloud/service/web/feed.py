"""What the page is sent: one text for each version, made once for all viewers."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from wearfleet_cloud.service.live import LiveState

__all__ = ["HEARTBEAT_S", "Feed", "Viewer"]

HEARTBEAT_S: Final = 2.0
_MAX_CACHED: Final = 16


class Feed:
    """Deltas of one picture as JSON text; viewers that stand at the same version share the text.

    Args:
        live: the picture.
    """

    def __init__(self, live: LiveState) -> None:
        self._live = live
        self._texts: dict[int, str] = {}
        self._version = -1

    @property
    def version(self) -> int:
        """The picture's version."""
        return self._live.version

    def text(self, since: int, *, fresh: bool) -> str:
        """The delta after version ``since``; ``fresh`` forbids a text made earlier for this version."""
        if fresh or self._version != self._live.version or len(self._texts) >= _MAX_CACHED:
            self._texts.clear()
            self._version = self._live.version
        if since not in self._texts:
            self._texts[since] = json.dumps(self._live.delta(since), separators=(",", ":"))
        return self._texts[since]


class Viewer:
    """One open page: which version it has, and what it is to get next.

    Args:
        feed: where the texts come from.
        clock_s: seconds of a clock that only goes forward.
    """

    def __init__(self, feed: Feed, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._feed = feed
        self._clock_s = clock_s
        self._since = -1
        self._sent_s = float("-inf")

    def next_text(self) -> str | None:
        """The next message: a delta if anything changed, a heartbeat every two seconds, otherwise None."""
        now_s = self._clock_s()
        changed = self._feed.version > self._since
        if not changed and now_s - self._sent_s < HEARTBEAT_S:
            return None
        text = self._feed.text(self._since, fresh=not changed)
        self._since, self._sent_s = self._feed.version, now_s
        return text

    def restart(self) -> None:
        """Send everything next: the page noticed that it missed something."""
        self._since = -1
