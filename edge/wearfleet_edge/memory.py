"""Resident memory of this process, and giving back what it does not need now."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

__all__ = ["private_bytes", "release_memory", "resident_bytes"]

_STATM: Final = Path("/proc/self/statm")
_STATUS: Final = Path("/proc/self/status")
_MAPS: Final = Path("/proc/self/maps")
_MADV_DONTNEED: Final = 4


def resident_bytes() -> int:
    """Resident memory of this process, in bytes (the peak where the system tells no present value)."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # noqa: PLC0415  not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def private_bytes() -> int:
    """Resident memory that no file backs, in bytes: what this process itself has filled (all of it if not told).

    The rest of `resident_bytes` is program code in the system's file cache, which the system drops when it needs the
    space. How much of it counts as resident differs with the cache: just after an installation it holds the libraries
    in pieces of 2 MiB, and Linux counts a whole piece once one byte of it has run; after a restart it holds only what
    was read.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return resident_bytes()


def release_memory() -> None:
    """Give back freed heap, and program code that only start-up or training needed; nothing where it cannot be done.

    Loading libraries and models touches tens of megabytes of code that runs once. Pages of code are clean copies of
    files: the system drops them at once and reads back from its cache the few that are used again. Only executable
    mappings are dropped, because read-only data may hold relocations that are in no file.
    """
    library = ctypes.CDLL(None)
    trim = getattr(library, "malloc_trim", None)
    if trim is not None:
        trim(0)
    if _MAPS.exists():
        for begin, end in _code_mappings(_MAPS.read_text()):
            library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _code_mappings(maps: str) -> list[tuple[int, int]]:
    """Address ranges of executable, never written mappings of files."""
    found = []
    for line in maps.splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[1] == "r-xp" and parts[5].startswith("/"):
            begin, end = parts[0].split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found
