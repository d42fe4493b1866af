"""int8 and int4: blocks of 256 numbers, each with one scale, rounded up or down at random so that the mean is right.

q = floor(x / s + u), u uniform in [0, 1), s = max |x| / levels of the block: E[q s] = x, |q s - x| <= s.

Source: Alistarh et al. 2017, arXiv:1610.02132 (QSGD); specs/federated.md section 19.
Differs: the scale is the block's largest magnitude, so that no number is clipped; levels are symmetric and 0 stays 0,
so one float32 a block replaces a scale and a zero point of 16 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from wearfleet_protos.errors import IntegrityError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wearfleet_protos.codecs.family import Reader

__all__ = ["BLOCK", "Int4", "Int8"]

BLOCK: Final = 256
"""Numbers with one scale."""


class Int8:
    """Scales (float32, one a block), then a byte a number."""

    def encode(self, values: NDArray[np.float32], draws: np.random.Generator) -> bytes:
        """As ``EachNumber.encode``."""
        scales, levels = _levels(values, 127, draws)
        return scales.astype("<f4").tobytes() + levels.tobytes()

    def size_bytes(self, count: int) -> int:
        """As ``EachNumber.size_bytes``."""
        return 4 * _blocks(count) + count

    def decode(self, reader: Reader, count: int) -> NDArray[np.float32]:
        """As ``EachNumber.decode``."""
        scales = reader.scales(_blocks(count))
        return _values(scales, reader.take("int8", count), 127)


class Int4:
    """Scales (float32, one a block), then a byte for two numbers, the lower half first: level + 8."""

    def encode(self, values: NDArray[np.float32], draws: np.random.Generator) -> bytes:
        """As ``EachNumber.encode``."""
        scales, levels = _levels(values, 7, draws)
        codes = np.full(len(levels) + len(levels) % 2, 8, np.uint8)
        codes[: len(levels)] = levels + 8
        return scales.astype("<f4").tobytes() + (codes[::2] | codes[1::2] << 4).tobytes()

    def size_bytes(self, count: int) -> int:
        """As ``EachNumber.size_bytes``."""
        return 4 * _blocks(count) + (count + 1) // 2

    def decode(self, reader: Reader, count: int) -> NDArray[np.float32]:
        """As ``EachNumber.decode``."""
        scales = reader.scales(_blocks(count))
        pairs = reader.take("uint8", (count + 1) // 2)
        codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:count]
        return _values(scales, codes.astype(np.int8) - np.int8(8), 7)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _levels(
    values: NDArray[np.float32], most: int, draws: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """The scale of each block, rounded up so that no level is beyond ``most``, and the level of each number."""
    count = len(values)
    blocks = np.zeros((_blocks(count), BLOCK))
    blocks.reshape(-1)[:count] = values
    wanted = np.abs(blocks).max(axis=1) / most
    scales = wanted.astype(np.float32)
    scales = np.where(scales < wanted, np.nextafter(scales, np.float32(np.inf)), scales)
    safe = np.where(scales > 0, scales, 1.0).astype(np.float64)
    levels = np.floor(blocks / safe[:, None] + draws.random(blocks.shape))
    return scales, levels.reshape(-1)[:count].astype(np.int8)


def _values(scales: NDArray[np.float32], levels: NDArray[np.int8], most: int) -> NDArray[np.float32]:
    if bool((levels < -most).any()):
        raise IntegrityError(f"encoded update has a level below {-most}")
    with np.errstate(over="ignore"):
        return levels.astype(np.float32) * np.repeat(scales, BLOCK)[: len(levels)]
