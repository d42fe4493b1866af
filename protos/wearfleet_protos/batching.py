"""Which windows a step of a plan sees, and the key of its random numbers: the same in torch and on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from wearfleet_protos.plan import Loop
    from wearfleet_protos.windowing import LabelledWindows

__all__ = ["Split", "batches", "part_of", "rng_key", "shuffle_order"]

Split = Literal["train", "fit", "select", "holdout"]


def _mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def rng_key(seed: int, round_number: int, phase: int, step: int) -> int:
    """Key of one step's random numbers: a non-negative integer below 2**31, the same in torch and on the device."""
    key = _mix(seed & ((1 << 64) - 1))
    for part in (round_number, phase, step):
        key = _mix(key ^ part)
    return key >> 33


def shuffle_order(seed: int, round_number: int, epoch: int, count: int) -> NDArray[np.int64]:
    """(count,) the order of the windows in one epoch; the same in torch and on the device."""
    generator = np.random.Generator(np.random.PCG64(rng_key(seed, round_number, 0x5BF, epoch)))
    return generator.permutation(count).astype(np.int64)


def part_of(split: Split, train: LabelledWindows, holdout: LabelledWindows) -> LabelledWindows:
    """The windows of a split; the same on the device and in a simulation.

    Neighbours of a window in ``select`` are in ``fit``, and windows may overlap: what is decided by ``select`` is
    decided by windows that are not quite new.
    """
    if split in ("train", "holdout"):
        return train if split == "train" else holdout
    chosen = np.arange(len(train)) % 5 == 4
    return train.select(chosen if split == "select" else ~chosen)


def batches(loop: Loop, seed: int, round_number: int, count: int) -> Iterator[NDArray[np.int64]]:
    """The window indices of every step of a loop over ``count`` windows; the last of an epoch may be short.

    Yields:
        (n,) int64 with 1 <= n <= batch_size.
    """
    steps = 0
    for epoch in range(loop.epochs):
        order = (
            shuffle_order(seed, round_number, epoch, count)
            if loop.shuffle
            else np.arange(count, dtype=np.int64)
        )
        for begin in range(0, count, loop.batch_size):
            if loop.max_steps and steps == loop.max_steps:
                return
            steps += 1
            yield order[begin : begin + loop.batch_size]
