"""topk and randk: some of all numbers together, as fp16. What they leave out must be fed back.

topk sends the k largest magnitudes, of equal ones the first, and the gaps between their places, seven bits a byte.
randk sends k numbers at places that seed and round give, the same for all clients, so places cost nothing and sums can
be masked.

Source: Stich et al. 2018, arXiv:1809.07599 (with memory); specs/federated.md section 19.
Differs: randk is not scaled by n / k: with feedback the plain number is the contraction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from wearfleet_protos.codecs.casts import Fp16
from wearfleet_protos.errors import IntegrityError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wearfleet_protos.codecs.declaration import UpdateCodec
    from wearfleet_protos.codecs.family import Arrays, Reader, Shapes, Turn

__all__ = ["RandK", "TopK", "places_of_all"]

_GAP_BYTES: Final = 5
"""A gap is below 2^35."""


@dataclass(frozen=True, slots=True)
class TopK:
    """Numbers (fp16 with one exponent), then gaps. Implements ``Family``."""

    codec: UpdateCodec
    turn: Turn

    def encode(
        self,
        tensors: Arrays,
        memory: Arrays,  # noqa: ARG002
        draws: np.random.Generator,
    ) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
        """As ``Family.encode``."""
        row = _row(tensors)
        count = self.codec.count(len(row), self.turn.round_number)
        places = _largest(np.abs(row), count)
        gaps = np.diff(places, prepend=-1) - 1
        return Fp16().encode(row[places], draws) + _pack(gaps), {}

    def most_bytes(self, shapes: Shapes) -> int:
        """As ``Family.most_bytes``: a gap of more than one byte skips more than 127 places."""
        total = _total(shapes)
        count = self.codec.count(total, self.turn.round_number)
        return Fp16().size_bytes(count) + count + total // 128

    def decode(self, reader: Reader, shapes: Shapes) -> dict[str, NDArray[np.float32]]:
        """As ``Family.decode``."""
        total = _total(shapes)
        count = self.codec.count(total, self.turn.round_number)
        values = Fp16().decode(reader, count)
        places = np.cumsum(_unpack(reader.rest(), count) + 1) - 1
        if places[-1] >= total:
            raise IntegrityError(f"encoded update has a number at {places[-1]}, there are {total}")
        return _spread(values, places, shapes)


@dataclass(frozen=True, slots=True)
class RandK:
    """Numbers (fp16 with one exponent) in the order of their places. Implements ``Family``."""

    codec: UpdateCodec
    turn: Turn

    def encode(
        self,
        tensors: Arrays,
        memory: Arrays,  # noqa: ARG002
        draws: np.random.Generator,
    ) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
        """As ``Family.encode``."""
        row = _row(tensors)
        return Fp16().encode(row[self._places(len(row))], draws), {}

    def most_bytes(self, shapes: Shapes) -> int:
        """As ``Family.most_bytes``."""
        return Fp16().size_bytes(self.codec.count(_total(shapes), self.turn.round_number))

    def decode(self, reader: Reader, shapes: Shapes) -> dict[str, NDArray[np.float32]]:
        """As ``Family.decode``."""
        places = self._places(_total(shapes))
        return _spread(Fp16().decode(reader, len(places)), places, shapes)

    def _places(self, total: int) -> NDArray[np.int64]:
        return places_of_all(self.turn.key, total, self.codec.count(total, self.turn.round_number))


def places_of_all(key: int, total: int, count: int) -> NDArray[np.int64]:
    """(count,) ascending places of ``total``: those whose scrambled number is smallest.

    The finaliser of SplitMix64 is one to one, so no two are equal and every version of NumPy chooses the same.
    """
    with np.errstate(over="ignore"):
        mixed = (np.arange(total, dtype=np.uint64) ^ np.uint64(key)) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.sort(np.argpartition(mixed, count - 1)[:count]).astype(np.int64)


def _largest(magnitudes: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """(count,) ascending places; the same on every processor, whose partitions of equal numbers differ."""
    last = len(magnitudes) - count
    least = np.partition(magnitudes, last)[last]
    chosen = magnitudes > least
    equal = np.flatnonzero(magnitudes == least)
    chosen[equal[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def _total(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _row(tensors: Arrays) -> NDArray[np.float32]:
    return np.concatenate([values.reshape(-1) for values in tensors.values()])


def _spread(
    values: NDArray[np.float32], places: NDArray[np.int64], shapes: Shapes
) -> dict[str, NDArray[np.float32]]:
    row = np.zeros(_total(shapes), np.float32)
    row[places] = values
    tensors, at = {}, 0
    for name, shape in shapes.items():
        tensors[name] = row[at : at + math.prod(shape)].reshape(shape)
        at += math.prod(shape)
    return tensors


def _pack(gaps: NDArray[Any]) -> bytes:
    """Non-negative integers as base-128 digits, the lowest first; every byte but a number's last one has bit 7 set."""
    lengths = np.ones(len(gaps), np.int64)
    for digit in range(1, _GAP_BYTES):
        lengths += gaps >= 1 << 7 * digit
    ends = np.cumsum(lengths)
    packed = np.zeros(int(ends[-1]), np.uint8)
    for digit in range(_GAP_BYTES):
        there = lengths > digit
        more = (lengths[there] > digit + 1).astype(np.uint8) << 7
        low = (gaps[there] >> 7 * digit & 127).astype(np.uint8)
        packed[ends[there] - lengths[there] + digit] = low | more
    return packed.tobytes()


def _unpack(packed: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """Inverse of :func:`_pack`.

    Raises:
        IntegrityError: not so many numbers, or one that is too long.
    """
    ends = np.flatnonzero(packed < 128) + 1
    begins = np.concatenate([[0], ends[:-1]])
    if len(ends) != count or ends[-1] != len(packed) or (ends - begins).max() > _GAP_BYTES:
        raise IntegrityError(f"encoded update has {len(ends)} places in {len(packed)} bytes, not {count}")
    digit = np.arange(len(packed)) - np.repeat(begins, ends - begins)
    return np.add.reduceat((packed & 127).astype(np.int64) << 7 * digit, begins)
