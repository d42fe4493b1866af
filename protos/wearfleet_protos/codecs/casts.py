"""fp16 and bf16: every number cast to 16 bits, to the nearest.

fp16 has 11 significant bits and a narrow range, so each tensor is divided by a power of two that brings its largest
number below 1: an error of at most 2^-11 |x|, or 2^-25 of that power where x is tiny beside it. bf16 has the range of
float32 and 8 significant bits: at most 2^-8 |x|.

Source: specs/federated.md section 19; IEEE 754 binary16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from wearfleet_protos.errors import IntegrityError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wearfleet_protos.codecs.family import Reader

__all__ = ["Bf16", "Fp16"]

_EXPONENTS: Final = range(-148, 129)


class Fp16:
    """The least e with |x| < 2^e for every number (int16), then x / 2^e for each."""

    def encode(self, values: NDArray[np.float32], draws: np.random.Generator) -> bytes:  # noqa: ARG002
        """As ``EachNumber.encode``."""
        exponent = int(np.frexp(np.abs(values).max())[1])
        scaled = np.ldexp(values.astype(np.float64), -exponent)
        return exponent.to_bytes(2, "little", signed=True) + scaled.astype("<f2").tobytes()

    def size_bytes(self, count: int) -> int:
        """As ``EachNumber.size_bytes``."""
        return 2 + 2 * count

    def decode(self, reader: Reader, count: int) -> NDArray[np.float32]:
        """As ``EachNumber.decode``."""
        exponent = int(reader.take("int16", 1)[0])
        if exponent not in _EXPONENTS:
            raise IntegrityError(f"encoded update has the exponent {exponent}; no update has")
        values = np.ldexp(reader.take("float16", count).astype(np.float64), exponent)
        with np.errstate(over="ignore"):
            return values.astype(np.float32)


class Bf16:
    """The upper half of each number's bits."""

    def encode(self, values: NDArray[np.float32], draws: np.random.Generator) -> bytes:  # noqa: ARG002
        """As ``EachNumber.encode``; half way between two goes to the even one."""
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()

    def size_bytes(self, count: int) -> int:
        """As ``EachNumber.size_bytes``."""
        return 2 * count

    def decode(self, reader: Reader, count: int) -> NDArray[np.float32]:
        """As ``EachNumber.decode``."""
        return (reader.take("uint16", count).astype(np.uint32) << 16).view(np.float32)
