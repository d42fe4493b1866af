"""The live page in a real browser: an event shows within a second, in light and dark, from loopback alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest
from browser import DESKTOP, PHONE, open_page, picture, set_view
from page_script import PEOPLE, fleet, running_round
from page_server import PageServer, serve_page, serve_process
from ports import free_port
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from wearfleet_cloud.service.live import LiveState, RibbonCell
from wearfleet_protos.labels import UCI_HAR6

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.browser, pytest.mark.slow]

BOARD = "getElement(Number(document.querySelector('.wf-host').id.slice(1))).board"
SCRIPT_NAME = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


@pytest.fixture
def live() -> LiveState:
    return LiveState("simulator", simulated=True)


@pytest.fixture
def server(live: LiveState) -> Iterator[PageServer]:
    with serve_page(live, title="Test fleet") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with open_page("about:blank") as driver:
        yield driver


@pytest.fixture
def page(server: PageServer, browser: Chrome) -> Iterator[Chrome]:
    set_view(browser, DESKTOP, dark=False)
    browser.get_log("browser")
    browser.get(server.url)
    until(browser, "return document.querySelector('.wf')?.dataset.version !== undefined")
    yield browser
    browser.get("about:blank")


def until(page: Chrome, script: str, *arguments: object, seconds: float = 60.0) -> None:
    WebDriverWait(page, seconds, poll_frequency=0.02).until(lambda _: page.execute_script(script, *arguments))


def show_fleet(server: PageServer, live: LiveState, page: Chrome) -> None:
    """Four devices in the middle of a round, drawn."""

    def seed() -> int:
        now_ns = live.now_ns
        wearers = fleet(live, now_ns)
        for wearer, (before, after) in zip(
            wearers, ((0.78, 0.93), (0.81, 0.9), (0.71, 0.88), (0.9, 0.94)), strict=True
        ):
            live.on_accuracy(wearer.device_id, before, after)
        live.on_round(running_round(now_ns, wearers))
        return live.version

    version = server.call(seed)
    until(page, "return document.querySelector('.wf').dataset.version >= arguments[0]", version)


def opens(page: Chrome, port: int) -> bool:
    page.get(f"http://127.0.0.1:{port}/")
    return True


def texts(page: Chrome, selector: str) -> list[str]:
    return [element.text for element in page.find_elements(By.CSS_SELECTOR, selector)]


def painted(page: Chrome) -> int:
    """Number of different colours in the middle line of the first ribbon."""
    return page.execute_script(
        """
        const canvas = document.querySelector('.wf-ribbon');
        const line = canvas.getContext('2d').getImageData(0, canvas.height / 2, canvas.width, 1).data;
        return new Set(Array.from({length: canvas.width}, (_, i) => line.slice(4 * i, 4 * i + 3).join())).size;
        """
    )


def test_a_page_without_devices_says_how_to_enrol_one(page: Chrome) -> None:
    assert "No device yet" in page.find_element(By.TAG_NAME, "body").text
    assert any("wearfleet-edge enrol" in text for text in texts(page, ".wf-empty code"))
    picture(page, "page-empty")


def test_each_event_comes_to_the_page_by_itself(server: PageServer, live: LiveState, page: Chrome) -> None:
    show_fleet(server, live, page)
    for sequence, activity in enumerate((3, 0, 4, 1, 5), start=1000):
        cell = RibbonCell(sequence, time.time_ns(), activity, 0.875, 0.1, False, "boot-1")
        server.call(lambda cell=cell: live.on_prediction("watch-0", "Amina", cell, 3, UCI_HAR6))
        expected = UCI_HAR6[activity].capitalize()
        until(page, "return document.querySelector('.wf-activity').textContent === arguments[0]", expected)


def test_the_page_shows_devices_round_and_unfamiliar_windows_in_light_and_dark(
    server: PageServer, live: LiveState, page: Chrome
) -> None:
    show_fleet(server, live, page)
    assert texts(page, ".wf-name") == list(PEOPLE)
    assert texts(page, ".wf-stat strong")[::2] == ["4 / 4", "v3"]
    assert texts(page, ".wf-after") == ["93 %", "90 %", "88 %", "94 %"]
    assert [
        row.find_element(By.CLASS_NAME, "wf-name").text for row in page.find_elements(By.CLASS_NAME, "wf-ood")
    ] == ["Chiara"]
    assert texts(page, ".wf-stage-word") == ["submitted", "training", "fetched", "invited"]
    assert page.find_element(By.CLASS_NAME, "wf-badge").text == "simulated · simulator"
    grounds = []
    for name, dark in (("light", False), ("dark", True)):
        set_view(page, DESKTOP, dark=dark)
        until(page, "return document.documentElement.dataset.theme === arguments[0]", name)
        time.sleep(0.5)
        assert painted(page) >= 3
        grounds.append(
            page.execute_script("return getComputedStyle(document.querySelector('.wf')).backgroundColor")
        )
        picture(page, f"page-{name}")
    assert grounds == ["rgb(242, 244, 247)", "rgb(13, 20, 32)"]


def test_the_viewer_may_choose_the_theme_with_the_keyboard_and_keeps_it(page: Chrome) -> None:
    button = page.find_element(By.CLASS_NAME, "wf-theme")
    button.send_keys(Keys.ENTER)
    until(page, "return document.documentElement.dataset.theme === 'dark'")
    page.refresh()
    until(page, "return document.documentElement.dataset.theme === 'dark'")


def test_arrow_keys_read_the_ribbon(server: PageServer, live: LiveState, page: Chrome) -> None:
    show_fleet(server, live, page)
    ribbon = page.find_element(By.CLASS_NAME, "wf-ribbon")
    ribbon.send_keys(Keys.ARROW_LEFT)
    newest = page.find_element(By.CLASS_NAME, "wf-tip").text
    ribbon.send_keys(Keys.ARROW_LEFT)
    assert "window 159" in newest
    assert "window 158" in page.find_element(By.CLASS_NAME, "wf-tip").text
    ribbon.send_keys(Keys.ESCAPE)
    assert not page.find_element(By.CLASS_NAME, "wf-tip").is_displayed()


@pytest.mark.parametrize("size", [PHONE, (820, 1180), DESKTOP, (1920, 1080)])
def test_no_screen_scrolls_sideways(
    server: PageServer, live: LiveState, page: Chrome, size: tuple[int, int]
) -> None:
    show_fleet(server, live, page)
    server.call(
        lambda: live.on_status(
            "long", True, live.now_ns, display_name="An-endless-name-without-any-space-" * 2
        )
    )
    set_view(page, size, dark=False)
    time.sleep(0.6)
    assert page.execute_script("return document.documentElement.scrollWidth") <= size[0]
    picture(page, f"page-{size[0]}")


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_complained_about(
    server: PageServer, live: LiveState, page: Chrome
) -> None:
    show_fleet(server, live, page)
    addresses = page.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert len(addresses) > 10
    assert {urlsplit(address).netloc for address in addresses} == {urlsplit(server.url).netloc}
    assert page.get_log("browser") == []


def test_text_from_a_device_is_never_markup(server: PageServer, live: LiveState, page: Chrome) -> None:
    cell = RibbonCell(0, time.time_ns(), 0, 0.9, 0.1, False)
    server.call(lambda: live.on_prediction("x", SCRIPT_NAME, cell, 1, (SCRIPT_NAME,), model_id=SCRIPT_NAME))
    until(page, "return document.querySelector('.wf-name') !== null")
    assert texts(page, ".wf-name") == [SCRIPT_NAME[:60]]
    assert page.execute_script("return document.querySelectorAll('.wf script, .wf img').length") == 0
    assert page.title == "Test fleet"


def test_a_removed_device_leaves_the_page(server: PageServer, live: LiveState, page: Chrome) -> None:
    show_fleet(server, live, page)
    server.call(lambda: live.on_removed("watch-1"))
    until(page, "return document.querySelectorAll('.wf-row').length === 3")
    assert texts(page, ".wf-name") == ["Amina", "Chiara", "Deniz"]


def test_nothing_moves_for_those_who_prefer_it_so(server: PageServer, live: LiveState, page: Chrome) -> None:
    show_fleet(server, live, page)
    moving = "return getComputedStyle(document.querySelector('.wf-arc.wf-training')).animationName"
    assert page.execute_script(moving) == "wf-breathe"
    set_view(page, DESKTOP, dark=False, calm=True)
    assert page.execute_script(moving) == "none"


def test_a_page_that_missed_a_message_asks_for_everything(
    server: PageServer, live: LiveState, page: Chrome
) -> None:
    show_fleet(server, live, page)
    page.execute_script(f"{BOARD}.store.version = 1")
    server.call(lambda: live.on_status("watch-9", True, live.now_ns, display_name="Ezra"))
    until(page, "return document.querySelectorAll('.wf-row').length === 5")


def test_a_page_that_hears_nothing_says_so_until_it_does(page: Chrome) -> None:
    page.execute_script(f"{BOARD}.receive = () => {{}}; {BOARD}.heardMs = 0")
    until(page, "return getComputedStyle(document.querySelector('.wf-lost')).display !== 'none'")
    page.execute_script(f"delete {BOARD}.receive")
    until(page, "return getComputedStyle(document.querySelector('.wf-lost')).display === 'none'")


def test_an_open_page_comes_back_when_the_service_was_restarted(browser: Chrome) -> None:
    port = free_port()
    with serve_process("before", port):
        WebDriverWait(browser, 60, ignored_exceptions=[WebDriverException]).until(lambda it: opens(it, port))
        until(browser, "return document.querySelector('.wf-badge')?.textContent === 'before'")
    with serve_process("after", port):
        until(browser, "return document.querySelector('.wf-badge')?.textContent === 'after'")
    browser.get("about:blank")


def test_a_second_application_in_the_same_process_shows_its_own_fleet(live: LiveState) -> None:
    other = LiveState("other", simulated=False)
    for state, title in ((live, "First"), (other, "Second")):
        with serve_page(state, title=title) as server:
            assert f"<title>{title}</title>" in httpx.get(server.url).text
            fleet_json = httpx.get(f"{server.url}api/v1/fleet").json()["fleet"]
            assert fleet_json["source_name"] == state.source_name
