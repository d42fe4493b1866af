"""How the service's process treats its memory: tuned for megabytes that come, are used once, and go."""

import ctypes
import gc
from typing import Final

__all__ = ["freeze_startup", "keep_freed_memory"]

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_FROM_HEAP: Final = 64 * 1024 * 1024
_MOST_KEPT: Final = 256 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Let the C library use freed megabytes again instead of giving each back to the system at once.

    Otherwise every chunk of an upload is mapped, filled with zeros page by page and unmapped: a sixth of the processor
    time of a round with a million parameters. At most 256 MiB are kept.

    Returns:
        False where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT))


def freeze_startup() -> None:
    """Take what is alive now out of garbage collection: modules and schemas stay for ever, and are many objects."""
    gc.collect()
    gc.freeze()
