"""Places that are bad for a federation: a file system that is too small, a link that is slow."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


class SmallDisk:
    """A file system of its own below a folder; needs the rights to mount one."""

    def __init__(self, folder: Path, kilobytes: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(command, check=False, capture_output=True).returncode != 0:
            pytest.skip("needs the rights to mount a small file system")

    def enlarge(self, kilobytes: int) -> None:
        """Give it more room."""
        self._run("mount", "-o", f"remount,size={kilobytes}k", str(self._folder))

    def close(self) -> None:
        """Take it away."""
        self._run("umount", "-l", str(self._folder))

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)


@asynccontextmanager
async def slow_link(address: str, bytes_per_s: float) -> AsyncIterator[str]:
    """A TCP proxy that lets so many bytes a second through in each direction; its address."""
    host, _, port = address.rpartition(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(16_384):
            await asyncio.sleep(len(data) / bytes_per_s)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@contextmanager
def slow_link_in_a_thread(address: str, bytes_per_s: float) -> Iterator[str]:
    """The same for tests that have no event loop."""
    loop, opened, found = asyncio.new_event_loop(), threading.Event(), list[str]()
    ended = asyncio.Event()

    async def serve() -> None:
        async with slow_link(address, bytes_per_s) as near:
            found.append(near)
            opened.set()
            await ended.wait()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    opened.wait()
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()
