"""What protects single windows in training: batches that are drawn in secret, and noise from the same secret source.

Each window enters each step's batch with probability q, independently (Poisson sampling). A batch has room for B: one
with more is drawn anew, all of it. Given which other windows are in, a window is then still in with probability q, or
surely not where the others fill the batch; so for a reader who sees a window's place emptied the bound of Poisson
sampling holds as it is, with nothing added for the redraw. A recording with more than B / q windows takes part with
that many, drawn in secret for the round: then q N <= B, and at least half of all draws are good.

A device draws from its operating system (:class:`SecretSource`); a simulation gives a seeded ``numpy`` generator, which
has the same two methods.

Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1; specs/federated.md section 18.4.
Differs: batches have a largest size (the paper's do not); normal numbers come from 53 random bits each and are floating
point, whose gaps are no secret (Mironov 2012).
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from wearfleet_protos.batching import batches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wearfleet_protos.plan import Loop

__all__ = ["SecretSource", "Source", "expected_batch", "steps_of"]

_BITS: Final = 53


class Source(Protocol):
    """Random numbers; ``numpy.random.Generator`` is one."""

    def random(self, size: int, /) -> NDArray[np.float64]:
        """(size,) uniform in [0, 1)."""

    def standard_normal(self, size: int, /) -> NDArray[np.float64]:
        """(size,) normal with mean 0 and variance 1."""


class SecretSource:
    """Implements :class:`Source` with the operating system's cryptographic random bytes; it keeps no state."""

    def random(self, size: int, /) -> NDArray[np.float64]:
        """As ``Source.random``, multiples of 2^-53."""
        words = np.frombuffer(os.urandom(8 * size), np.uint64)
        return np.asarray((words >> np.uint64(64 - _BITS)) * 2.0**-_BITS)

    def standard_normal(self, size: int, /) -> NDArray[np.float64]:
        """As ``Source.standard_normal``, by the method of Box and Muller; none is beyond 8.6."""
        half = (size + 1) // 2
        drawn = self.random(2 * half)
        length, angle = np.sqrt(-2.0 * np.log1p(-drawn[:half])), 2.0 * np.pi * drawn[half:]
        return np.concatenate([length * np.cos(angle), length * np.sin(angle)])[:size]


def steps_of(loop: Loop, seed: int, round_number: int, count: int, source: Source) -> list[NDArray[np.int64]]:
    """The window indices of every step of a loop over ``count`` windows: its passes, or its secret batches.

    Args:
        loop: of a phase.
        seed: of the plan; secret batches have nothing to do with it.
        round_number: of the round.
        count: windows of the loop's split; without any there is no step.
        source: of secret batches.

    Returns:
        (n,) int64 each, 0 <= n <= batch size.
    """
    if not loop.sampling_rate:
        return list(batches(loop, seed, round_number, count))
    if not count:
        return []
    taking_part = _taking_part(loop, count, source)
    return [_poisson(loop, taking_part, source) for _ in range(loop.max_steps)]


def expected_batch(loop: Loop, count: int) -> float:
    """The mean size q N of a secret batch before the redraw: what sums of gradients are divided by; 0 of passes."""
    return loop.sampling_rate * min(count, _most(loop)) if loop.sampling_rate else 0.0


def _most(loop: Loop) -> int:
    """Windows that can take part."""
    return math.floor(loop.batch_size / loop.sampling_rate)


def _taking_part(loop: Loop, count: int, source: Source) -> NDArray[np.int64]:
    most = _most(loop)
    if count <= most:
        return np.arange(count, dtype=np.int64)
    return np.sort(np.argsort(source.random(count), kind="stable")[:most]).astype(np.int64)


def _poisson(loop: Loop, taking_part: NDArray[np.int64], source: Source) -> NDArray[np.int64]:
    while True:
        chosen = taking_part[source.random(len(taking_part)) < loop.sampling_rate]
        if len(chosen) <= loop.batch_size:
            return chosen
