"""Resident memory of this process, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

__all__ = ["release_free_memory", "resident_bytes"]

_STATM: Final = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Resident memory of this process, in bytes (the peak where the system tells no present value)."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # noqa: PLC0415  not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def release_free_memory() -> None:
    """Ask the C library to return freed pages; training leaves many. Nothing happens where it cannot."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
