"""Which windows make a batch: functions of a key and the number of a step, drawn on the device.

So a run in pieces is the same run, and ``torch.func.vmap`` over keys draws for many runs at once.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor
from wearfleet_models import randomness

__all__ = ["BLOCK", "Sampler", "draw_block", "draw_pass", "pass_steps", "sampler"]

Sampling = Literal["per-domain", "pooled"]
BLOCK = 64
"""Steps whose windows are drawn by one call."""


class Sampler(Protocol):
    """Draws the windows of one step after the other."""

    def at(self, step: int) -> Tensor:
        """(D, B) int64 numbers of the windows of a step."""


def draw_block(key: Tensor, block: int, size: int, first: Tensor, count: Tensor) -> Tensor:
    """Windows of a block of steps, uniformly with replacement within each domain.

    Args:
        key: () int64.
        block: number of the block of 64 steps.
        size: windows a domain.
        first: (D,) int64 first window of each domain.
        count: (D,) int64 windows of each domain.

    Returns:
        (64, D, size) int64.
    """
    shape = (BLOCK, count.shape[0], size)
    return randomness.integers(randomness.derive(key, block), 0, shape, count[:, None]) + first[:, None]


def draw_pass(key: Tensor, number: int, windows: int) -> Tensor:
    """The random order of pass ``number`` through all windows: (windows,) int64, each once."""
    return randomness.permutation(randomness.derive(key, number), 0, windows)


def pass_steps(sampling: Sampling, sizes: tuple[int, ...], size: int) -> int:
    """Steps that see all windows once: of the smallest domain, or of all domains together; at least 1.

    Args:
        sampling: how batches are drawn.
        sizes: windows of each domain.
        size: windows a domain of a batch.
    """
    return max((sum(sizes) if sampling == "pooled" else min(sizes)) // size, 1)


def sampler(
    sampling: Sampling, key: Tensor, size: int, *, first: Tensor, count: Tensor, sizes: tuple[int, ...]
) -> Sampler:
    """Draws for one run.

    Args:
        sampling: "per-domain" with replacement, or "pooled" passes without.
        key: () int64.
        size: windows a domain; of all domains together for "pooled", at most all of them.
        first: (D,) int64 first window of each domain.
        count: (D,) int64 windows of each domain, on the device.
        sizes: the same on the host.
    """
    if sampling == "pooled":
        return _Passes(key, min(size, sum(sizes)), sum(sizes))
    return _WithReplacement(key, size, first, count)


@dataclass(slots=True)
class _WithReplacement:
    key: Tensor
    size: int
    first: Tensor
    count: Tensor
    block: int = -1
    drawn: Tensor | None = None

    def at(self, step: int) -> Tensor:
        if self.drawn is None or step // BLOCK != self.block:
            self.block = step // BLOCK
            self.drawn = draw_block(self.key, self.block, self.size, self.first, self.count)
        return self.drawn[step % BLOCK]


@dataclass(slots=True)
class _Passes:
    key: Tensor
    size: int
    windows: int
    number: int = -1
    order: Tensor | None = None

    def at(self, step: int) -> Tensor:
        steps = self.windows // self.size
        if self.order is None or step // steps != self.number:
            self.number = step // steps
            self.order = draw_pass(self.key, self.number, self.windows)
        begin = step % steps * self.size
        return self.order[None, begin : begin + self.size]
