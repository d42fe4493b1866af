"""The live page: mounts NiceGUI on the service's application and feeds one canvas board for each viewer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from fastapi import Request
from nicegui import app as nicegui_app
from nicegui import ui

from .api import api_router
from .feed import Feed, Viewer
from .palette import DARK, LIGHT

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from wearfleet_cloud.service.live import LiveState

__all__ = ["TICK_S", "mount"]

TICK_S: Final = 0.25
"""How often a viewer looks for news; with one way over the socket an event shows well within a second."""

_SCOPE_KEY: Final = "wearfleet.page"
_BOARD: Final = Path(__file__).parent / "board"


class FleetBoard(ui.element, component="fleetboard.js", esm={"wearfleet-board": "board"}):
    """The whole visible page as one component, which draws what ``receive`` gives it.

    Args:
        title: name of the fleet.
        enrol_hint: command that enrols a device, shown while there is none.
    """

    def __init__(self, title: str, enrol_hint: str) -> None:
        super().__init__()
        self._props["title"] = title
        self._props["enrol-hint"] = enrol_hint
        self._props["palette"] = {"light": list(LIGHT), "dark": list(DARK)}


class _PageOf:
    """ASGI layer that tells the page function which picture the application shows."""

    def __init__(self, app: ASGIApp, page: tuple[Feed, str, str]) -> None:
        self._app = app
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[_SCOPE_KEY] = self._page
        await self._app(scope, receive, send)


def mount(
    app: FastAPI,
    live: LiveState,
    *,
    title: str = "wearfleet",
    enrol_hint: str = "wearfleet-edge enrol TICKET",
) -> None:
    """Put the live page on ``/`` and its JSON interface under ``/api/v1``.

    Routes that the application declares itself go first if they are declared before this call. Nothing is loaded
    from elsewhere: scripts, styles and fonts come from this process. May be called for one application after
    another in a process.

    Args:
        app: the service's application, not yet started.
        live: the picture to show.
        title: name of the fleet, in the header and the window title.
        enrol_hint: what the empty page tells to run on a device.
    """
    app.include_router(api_router(live))
    app.add_middleware(_PageOf, page=(Feed(live), title, enrol_hint))
    ui.page("/")(_fleet_page)
    nicegui_app.user_middleware.clear()
    nicegui_app.middleware_stack = None
    ui.run_with(
        app,
        title=title,
        favicon=_BOARD / "icon.svg",
        dark=None,
        tailwind=False,
        show_welcome_message=False,
        reconnect_timeout=10.0,
    )


def _fleet_page(request: Request) -> None:
    feed, title, enrol_hint = request.scope[_SCOPE_KEY]
    board = FleetBoard(title, enrol_hint)
    viewer = Viewer(feed)
    board.on("resync", viewer.restart, args=[])
    ui.page_title(title)

    def tick() -> None:
        text = viewer.next_text()
        if text is not None:
            board.run_method("receive", text)

    ui.timer(TICK_S, tick)
