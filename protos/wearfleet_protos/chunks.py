"""Chunks of an artifact on the wire, and their checksum."""

from __future__ import annotations

from typing import Final

import google_crc32c

__all__ = ["CHUNK_BYTES", "crc32c"]

CHUNK_BYTES: Final = 1024 * 1024
"""Bytes in each chunk but the last."""


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) checksum, computed by the processor where it can."""
    return int(google_crc32c.value(data))
