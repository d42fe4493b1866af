"""The live page on an ephemeral loopback port, with a picture that a test feeds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import uvicorn
from fastapi import FastAPI
from wearfleet_cloud.service.web.page import mount

R = TypeVar("R")

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

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
def serve_process(source_name: str, port: int) -> Iterator[None]:
    """Serve an empty picture from a process of its own, which is killed when the block ends."""
    script = (
        "import threading; from page_server import serve_page; from wearfleet_cloud.service.live import LiveState\n"
        f"with serve_page(LiveState({source_name!r}), port={port}): threading.Event().wait()"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent) as process:
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def serve_page(live: LiveState, *, title: str = "wearfleet", port: int = 0) -> Iterator[PageServer]:
    """Serve the page in a thread until the block ends; ``port`` 0 takes a free one."""
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loops.append(asyncio.get_running_loop())
        started.set()
        yield

    app = FastAPI(lifespan=lifespan)
    mount(app, live, title=title)
    listener = socket.create_server(("127.0.0.1", port))
    bound = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield PageServer(f"http://127.0.0.1:{bound}/", loops[0])
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()
