"""sign: one bit a number, and one scale a tensor: mean |x|. What it loses must be fed back.

Source: Karimireddy et al. 2019, arXiv:1901.09847 (EF-signSGD, section 4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wearfleet_protos.codecs.family import Reader

__all__ = ["Sign"]


class Sign:
    """The scale (float32), then eight numbers a byte, the lowest bit first: 1 for x >= 0."""

    def encode(self, values: NDArray[np.float32], draws: np.random.Generator) -> bytes:  # noqa: ARG002
        """As ``EachNumber.encode``."""
        scale = np.array(np.abs(values).mean(dtype=np.float64), "<f4")
        return scale.tobytes() + np.packbits(values >= 0, bitorder="little").tobytes()

    def size_bytes(self, count: int) -> int:
        """As ``EachNumber.size_bytes``."""
        return 4 + (count + 7) // 8

    def decode(self, reader: Reader, count: int) -> NDArray[np.float32]:
        """As ``EachNumber.decode``."""
        scale = reader.scales(1)[0]
        bits = np.unpackbits(reader.take("uint8", (count + 7) // 8), count=count, bitorder="little")
        return np.asarray(np.where(bits == 1, scale, -scale), np.float32)
