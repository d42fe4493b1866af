"""What a family of codecs does, the turn it does it in, and the reader of its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wearfleet_protos.errors import IntegrityError

__all__ = ["Arrays", "EachNumber", "Family", "Reader", "Shapes", "Turn"]

Arrays = Mapping[str, NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Turn:
    """What both ends know of a round: the plan's seed, and the round's number from 1."""

    seed: int
    round_number: int

    @property
    def key(self) -> int:
        """64 bits that all clients and the service have in common."""
        return int.from_bytes(hashlib.sha256(self._text()).digest()[:8], "little")

    def draws(self, client: str) -> np.random.Generator:
        """Random numbers of one client: others than everybody else's, and the same when the round is made again."""
        digest = hashlib.sha256(self._text() + b"\n" + client.encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))

    def _text(self) -> bytes:
        return f"wearfleet update codec\n{self.seed}\n{self.round_number}".encode()


class Family(Protocol):
    """Codes several float32 tensors, in the order of the mapping; which ones is decided elsewhere."""

    def encode(
        self, tensors: Arrays, memory: Arrays, draws: np.random.Generator
    ) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
        """Bytes of finite tensors, and what helps the next time; ``memory`` is that of the last time, or empty."""

    def most_bytes(self, shapes: Shapes) -> int:
        """Largest number of bytes that :meth:`encode` gives for tensors of these shapes."""

    def decode(self, reader: Reader, shapes: Shapes) -> dict[str, NDArray[np.float32]]:
        """Tensors of these shapes; they may hold values that are not finite.

        Raises:
            IntegrityError: the bytes cannot be an update of these shapes.
        """


class EachNumber(Protocol):
    """Codes a row of float32 numbers; one row a tensor."""

    def encode(self, values: NDArray[np.float32], draws: np.random.Generator) -> bytes:
        """Bytes of (n,) finite numbers, n > 0."""

    def size_bytes(self, count: int) -> int:
        """Bytes that n numbers take."""

    def decode(self, reader: Reader, count: int) -> NDArray[np.float32]:
        """(n,) numbers.

        Raises:
            IntegrityError: the bytes cannot be n coded numbers.
        """


class Reader:
    """Little-endian numbers, one array after the other.

    Args:
        data: all bytes.
    """

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    def take(self, dtype: str, count: int) -> NDArray[Any]:
        """(count,) the next numbers; a view of the bytes.

        Raises:
            IntegrityError: so many are not there.
        """
        kind = np.dtype(dtype).newbyteorder("<")
        end = self._at + count * kind.itemsize
        if end > len(self._data):
            raise IntegrityError(f"encoded update ends at byte {len(self._data)}, at least {end} are needed")
        values = np.frombuffer(self._data[self._at : end], kind)
        self._at = end
        return values

    def scales(self, count: int) -> NDArray[np.float32]:
        """(count,) the next scales.

        Raises:
            IntegrityError: one is negative or not finite, or they are not there.
        """
        values = self.take("float32", count)
        if not bool((np.isfinite(values) & (values >= 0)).all()):
            raise IntegrityError("encoded update has a scale that is negative or not finite")
        return values

    def rest(self) -> NDArray[np.uint8]:
        """All bytes that are left."""
        return self.take("uint8", len(self._data) - self._at)

    def end(self) -> None:
        """Check that nothing is left.

        Raises:
            IntegrityError: something is.
        """
        if self._at != len(self._data):
            raise IntegrityError(f"encoded update has {len(self._data)} bytes, {self._at} were expected")
