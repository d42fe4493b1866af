"""Chunks of an artifact on the wire, and their checksum.

A megabyte in a protobuf object is copied at each assignment and at each look. So the messages that carry chunks are
written and read here, without an object: the bytes of a chunk are copied once when it is sent, and never when it is
received. The wire format is the schema's (``artifact.proto``); every other field is left to protobuf.

Source: Protocol Buffers, "Encoding" (varints, length-delimited fields, field order does not matter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import google_crc32c
import numpy as np

from wearfleet_protos.errors import ProtocolError

__all__ = [
    "CHUNK_BYTES",
    "RECEIVED_CHUNK",
    "SENT_CHUNK",
    "WireChunk",
    "chunk_message",
    "crc32c",
    "split_chunk",
]

CHUNK_BYTES: Final = 1024 * 1024
"""Bytes in each chunk but the last."""

RECEIVED_CHUNK: Final = 1
"""Field of the chunk in what a device receives: ``DownloadArtifactResponse`` and ``WorkResponse``."""

SENT_CHUNK: Final = 2
"""Field of the chunk in what a device sends: ``UploadArtifactRequest`` and ``WorkRequest``."""

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5
_OFFSET_TAG: Final = b"\x08"
_DATA_TAG: Final = b"\x12"
_CRC_TAG: Final = b"\x1d"


@dataclass(frozen=True, slots=True)
class WireChunk:
    """A chunk as it came: its bytes are a view of the message, ``crc32c`` is what the sender says."""

    offset: int
    data: memoryview
    crc32c: int

    @property
    def intact(self) -> bool:
        """True when the bytes have the checksum that the sender says."""
        return crc32c(self.data) == self.crc32c


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC-32C (Castagnoli) checksum, computed by the processor where it can."""
    return int(google_crc32c.value(np.frombuffer(data, np.uint8)))  # the library takes an array, but no view


def chunk_message(field: int, offset: int, data: bytes | bytearray | memoryview, rest: bytes = b"") -> bytes:
    """Wire bytes of a message with a chunk.

    Args:
        field: number of the chunk's field, ``RECEIVED_CHUNK`` or ``SENT_CHUNK``.
        offset: of the chunk in its artifact.
        data: bytes of the chunk.
        rest: wire bytes of the message's other fields.
    """
    head = _OFFSET_TAG + _varint(offset) + _DATA_TAG + _varint(len(data))
    tail = _CRC_TAG + crc32c(data).to_bytes(4, "little")
    size = len(head) + len(data) + len(tail)
    return b"".join((rest, _tag(field, _BYTES), _varint(size), head, data, tail))


def split_chunk(field: int, message: bytes) -> tuple[bytes, WireChunk | None]:
    """Take a message apart into its other fields and its chunk.

    Args:
        field: number of the chunk's field.
        message: wire bytes.

    Returns:
        Wire bytes of all other fields, and the chunk; None when the message has none.

    Raises:
        ProtocolError: not a message, or it has more than one chunk.
    """
    view = memoryview(message)
    rest: list[memoryview] = []
    chunk: WireChunk | None = None
    at = 0
    while at < len(view):
        number, kind, value, end = _field(view, at, len(view))
        if number != field or kind != _BYTES:
            rest.append(view[at:end])
        elif chunk is None:
            chunk = _chunk(view, value, end)
        else:
            raise ProtocolError("a message holds more than one chunk")
        at = end
    return b"".join(rest), chunk


def _chunk(view: memoryview, at: int, end: int) -> WireChunk:
    """The ``Chunk`` between two offsets; an absent field has its default, of a repeated one the last counts."""
    offset, data, checksum = 0, view[end:end], 0
    while at < end:
        number, kind, value, after = _field(view, at, end)
        if (number, kind) == (1, _VARINT):
            offset, _ = _read_varint(view, value, end)
        elif (number, kind) == (2, _BYTES):
            data = view[value:after]
        elif (number, kind) == (3, _FIXED32):
            checksum = int.from_bytes(view[value:after], "little")
        at = after
    return WireChunk(offset, data, checksum)


def _field(view: memoryview, at: int, end: int) -> tuple[int, int, int, int]:
    """The field at an offset: its number, wire type, where its value begins, and where it ends.

    Raises:
        ProtocolError: cut off, a number of 0, or a wire type that no field of ours has had.
    """
    tag, value = _read_varint(view, at, end)
    number, kind = tag >> 3, tag & 7
    if kind == _VARINT:
        _, after = _read_varint(view, value, end)
    elif kind == _BYTES:
        size, value = _read_varint(view, value, end)
        after = value + size
    elif kind in (_FIXED32, _FIXED64):
        after = value + (4 if kind == _FIXED32 else 8)
    else:
        raise ProtocolError(f"field {number} at byte {at} has the wire type {kind}; not a message of ours")
    if number == 0 or after > end:
        raise ProtocolError(f"field {number} at byte {at} ends at {after} of {end} bytes; the message is cut")
    return number, kind, value, after


def _read_varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:  # ten bytes hold 64 bits
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise ProtocolError(f"the number that ends at byte {at} is cut or too long; not a message of ours")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _tag(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)
