"""Ports that no other test is given, for servers that must come back on the port they had.

The system hands out ports from 32768 on to whoever asks for any free one; these lie below, a block a test process.
"""

from __future__ import annotations

import os
import socket
from itertools import cycle
from typing import Final

__all__ = ["free_port"]

_FIRST: Final = 12_000
_BLOCK: Final = 2_500
_WORKER: Final = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
# two test runs at once on one machine begin at different places of the same block
_PORTS: Final = cycle(
    _FIRST + _WORKER * _BLOCK + (os.getpid() * 101 + number) % _BLOCK for number in range(_BLOCK)
)


def free_port() -> int:
    """A port of the loopback that nobody listens on now, and that nobody gets by asking for any free one."""
    return next(filter(_is_free, _PORTS))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
