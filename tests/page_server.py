"""The live page on an ephemeral loopback port, with a picture that a test feeds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import TYPE_CHECKING, TypeVar

import uvicorn
from fastapi import FastAPI
from wearfleet_cloud.service.web.page import mount

R = TypeVar("R")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from wearfleet_cloud.service.live import LiveState


class PageServer:
    """A running page: its address, and a way to change the picture inside its loop."""

    def __init__(self, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self.url = url
        self._loop = loop

    def call(self, change: Callable[[], R]) -> R:
        """Run ``change`` in the server's loop and give its result."""

        async def run() -> R:
            return change()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout=10)


@contextlib.contextmanager
def serve_page(live: LiveState, *, title: str = "wearfleet") -> Iterator[PageServer]:
    """Serve the page in a thread until the block ends."""
    app = FastAPI()
    mount(app, live, title=title)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        started.set()
        await serving

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert started.wait(20)
    assert server.started
    try:
        yield PageServer(f"http://127.0.0.1:{port}/", loops[0])
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()
