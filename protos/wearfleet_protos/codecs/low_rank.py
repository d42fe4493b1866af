"""powersgd: each matrix M as P Q^T of rank r, by one step of power iteration from the Q of the last time.

P = orthonormal(M Q), Q <- M^T P. Kernels (O, C, k) are matrices (O, C k). What it loses must be fed back.

Source: Vogels et al. 2019, arXiv:1905.13727, algorithm 1.
Differs: a client has its own P and Q (the paper averages both among workers in two passes), so one pass is enough and
the mean of m clients has rank m r; vectors, and matrices that would not get smaller, are sent as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wearfleet_protos.codecs.family import Arrays, Reader, Shapes

__all__ = ["PowerSgd"]


@dataclass(frozen=True, slots=True)
class PowerSgd:
    """P (a, r) and Q (b, r) of each matrix, float32. Implements ``Family``."""

    rank: int

    def encode(
        self, tensors: Arrays, memory: Arrays, draws: np.random.Generator
    ) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
        """As ``Family.encode``; the memory is Q by name."""
        parts, bases = [], {}
        for name, values in tensors.items():
            rank = self._rank(values.shape)
            if not rank:
                parts.append(values.astype("<f4").tobytes())
                continue
            matrix = values.reshape(values.shape[0], -1).astype(np.float64)
            basis = memory.get(name)
            if basis is None or not basis.any():
                basis = draws.standard_normal((matrix.shape[1], rank), np.float32)
            left = np.linalg.qr(matrix @ basis.astype(np.float64))[0].astype("<f4")
            bases[name] = (matrix.T @ left.astype(np.float64)).astype("<f4")
            parts += [left.tobytes(), bases[name].tobytes()]
        return b"".join(parts), bases

    def most_bytes(self, shapes: Shapes) -> int:
        """As ``Family.most_bytes``."""
        return 4 * sum(self._numbers(shape) for shape in shapes.values())

    def decode(self, reader: Reader, shapes: Shapes) -> dict[str, NDArray[np.float32]]:
        """As ``Family.decode``."""
        tensors = {}
        for name, shape in shapes.items():
            rank = self._rank(shape)
            if not rank:
                tensors[name] = reader.take("float32", math.prod(shape)).reshape(shape)
                continue
            rows, columns = shape[0], math.prod(shape[1:])
            left = reader.take("float32", rows * rank).reshape(rows, rank)
            right = reader.take("float32", columns * rank).reshape(columns, rank)
            with np.errstate(over="ignore", invalid="ignore"):
                tensors[name] = np.matmul(left, right.T, dtype=np.float32).reshape(shape)
        return tensors

    def _rank(self, shape: tuple[int, ...]) -> int:
        """Rank of what is sent; 0 where P and Q would not be smaller."""
        if len(shape) < 2:
            return 0
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(self.rank, rows, columns)
        return rank if rank * (rows + columns) < rows * columns else 0

    def _numbers(self, shape: tuple[int, ...]) -> int:
        rank = self._rank(shape)
        return rank * (shape[0] + math.prod(shape[1:])) if rank else math.prod(shape)
