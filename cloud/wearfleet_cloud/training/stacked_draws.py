"""Which windows make the batches of many runs: the draws of the single runs, all runs by one call."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap
from wearfleet_models import randomness

from wearfleet_cloud.algorithms.base import Algorithm
from wearfleet_cloud.training.loop import INDICES
from wearfleet_cloud.training.pool import Tables
from wearfleet_cloud.training.sampling import BLOCK, draw_block, draw_pass, pass_steps

__all__ = ["StackedDraws"]


class StackedDraws:
    """Numbers of the training windows of every step, for all runs at once: those the single runs draw.

    Args:
        algorithm: says how many windows and in which way.
        tables: sizes of the domains of every run.
        batch: windows a domain that were asked for.
        keys: (R,) int64 key of every run.
    """

    def __init__(self, algorithm: Algorithm, tables: Tables, batch: int, keys: Tensor) -> None:
        self._sampling, self._tables = algorithm.info.sampling, tables
        self._keys = vmap(lambda key: randomness.derive(key, INDICES))(keys)
        self._windows = sum(tables.sizes[0])
        size = algorithm.shape(batch)[1]
        self.in_a_pass = pass_steps(self._sampling, tables.sizes[0], size)
        self._size = min(size, self._windows) if self._sampling == "pooled" else size
        self._number = -1
        self._drawn = torch.zeros(0)

    def at(self, step: int) -> Tensor:
        """(R, D, B) int64 for a step."""
        if self._sampling == "pooled":
            steps = self._windows // self._size
            self._renew(step // steps, lambda key: draw_pass(key, step // steps, self._windows))
            begin = step % steps * self._size
            return self._drawn[:, None, begin : begin + self._size]
        self._renew(step // BLOCK, None)
        return self._drawn[:, step % BLOCK]

    def _renew(self, number: int, one_pass: Callable[[Tensor], Tensor] | None) -> None:
        if number == self._number:
            return
        self._number = number
        if one_pass is not None:
            self._drawn = vmap(one_pass)(self._keys)
            return
        size, tables = self._size, self._tables
        self._drawn = vmap(lambda key, first, count: draw_block(key, number, size, first, count))(
            self._keys, tables.first, tables.count
        )
