"""The live page over a real service: what a device recognises is on the page within a second of its arrival."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from browser import open_page, picture
from fleet_processes import PEOPLE, Fleet, Kit, wait_for
from selenium.webdriver.common.by import By
from wearfleet_protos.labels import SIMULATED6

if TYPE_CHECKING:
    from pathlib import Path

    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.e2e, pytest.mark.browser, pytest.mark.broker]

WATCH = """
window.seen = [];
const note = () => {
  const row = document.querySelector('.wf-row');
  const count = row?.querySelector('.wf-ribbon').getAttribute('aria-label')?.match(/(\\d+) windows/);
  if (count) window.seen.push([Date.now(), Number(count[1]), row.querySelector('.wf-activity').textContent]);
};
new MutationObserver(note).observe(document.body, {
  subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ['aria-label'],
});
"""
WINDOWS = 40


def watch(page: Chrome, count: int) -> list[tuple[int, int, str]]:
    """(Unix milliseconds, windows received so far, activity shown) at every change until ``count`` windows came."""
    page.execute_script(WATCH)
    wait_for(
        f"the page shows {count} windows",
        lambda: page.execute_script("return window.seen.at(-1)?.[1] ?? 0") >= count,
    )
    return [tuple(entry) for entry in page.execute_script("return window.seen")]


def stored(fleet: Fleet) -> list[tuple[Any, ...]]:
    """(received, class) of every prediction in the order of the stream."""
    return fleet.rows("SELECT received_ns, label FROM predictions ORDER BY stream_id, sequence")


def test_the_page_shows_a_new_device_and_every_activity_within_one_second(kit: Kit, tmp_path: Path) -> None:
    name = PEOPLE[0]
    with Fleet(tmp_path, kit) as fleet:
        ready = fleet.start_service("--source-name", "simulator", "--simulated")
        fleet.admin("models", "publish", str(kit.model))
        with open_page(f"http://{ready['host']}:{ready['web_port']}/") as page:
            wait_for("the empty page", lambda: "No device yet" in page.find_element(By.TAG_NAME, "body").text)
            fleet.enrol(name)
            fleet.start_agent(name, "--speed", "6")
            seen = watch(page, WINDOWS)
            rows = stored(fleet)
            picture(page, "live-page-end-to-end")
            assert page.find_element(By.CLASS_NAME, "wf-name").text == name
            assert page.find_element(By.CLASS_NAME, "wf-badge").text == "simulated · simulator"
            assert page.get_log("browser") == []
    delays = [next(at for at, count, _ in seen if count > k) - rows[k][0] / 1e6 for k in range(WINDOWS)]
    assert max(delays) < 1000.0, delays
    last_of_each = {count: activity for _, count, activity in seen}
    shown = {count: activity for count, activity in last_of_each.items() if 0 < count < max(last_of_each)}
    assert shown == {count: SIMULATED6[rows[count - 1][1]].capitalize() for count in shown}
    assert len(set(shown.values())) >= 3
