"""What a viewer is sent, and when."""

from __future__ import annotations

import json

from wearfleet_cloud.service.live import LiveState
from wearfleet_cloud.service.web.feed import HEARTBEAT_S, Feed, Viewer


class Seconds:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def viewer_of(live: LiveState) -> tuple[Viewer, Seconds]:
    seconds = Seconds()
    return Viewer(Feed(live), seconds), seconds


def test_a_viewer_gets_everything_first_then_only_news() -> None:
    live = LiveState()
    live.on_status("d1", True, 1)
    viewer, _ = viewer_of(live)
    assert json.loads(viewer.next_text())["since"] == -1
    assert viewer.next_text() is None
    live.on_status("d2", True, 1)
    news = json.loads(viewer.next_text())
    assert (news["since"], [row["id"] for row in news["devices"]]) == (1, ["d2"])


def test_a_silent_fleet_still_sends_a_heartbeat_with_the_time() -> None:
    times = iter(range(1, 99))
    live = LiveState(clock_ns=lambda: next(times) * 1_000_000)
    viewer, seconds = viewer_of(live)
    first = json.loads(viewer.next_text())
    seconds.now += HEARTBEAT_S
    beat = json.loads(viewer.next_text())
    assert beat["devices"] == []
    assert beat["time_ms"] > first["time_ms"]


def test_a_viewer_that_missed_something_gets_everything_again() -> None:
    live = LiveState()
    live.on_status("d1", True, 1)
    viewer, _ = viewer_of(live)
    viewer.next_text()
    viewer.restart()
    assert json.loads(viewer.next_text())["since"] == -1


def test_viewers_at_the_same_version_share_one_text() -> None:
    live = LiveState()
    feed = Feed(live)
    live.on_status("d1", True, 1)
    assert feed.text(0, fresh=False) is feed.text(0, fresh=False)
    stale = feed.text(0, fresh=False)
    live.on_status("d2", True, 1)
    assert feed.text(0, fresh=False) != stale
