"""One copy of a data set's windows on a device, and tables by which each of several runs sees its own part of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from wearfleet_protos.errors import DataError

from wearfleet_cloud.algorithms.base import Batch
from wearfleet_cloud.data.windows import WindowSet
from wearfleet_cloud.training.run import Run

__all__ = ["Pool", "RunWindows", "Tables", "pool_of", "table", "tables_of"]


@dataclass(frozen=True, slots=True)
class Pool:
    """All windows of a prepared data set: x (N, T, C) float32 raw, channels innermost, and y (N,) int64."""

    x: Tensor
    y: Tensor

    def windows(self, number: Tensor) -> Tensor:
        """Raw windows (..., C, T) by their numbers (...)."""
        return self.x[number].transpose(-1, -2)


@dataclass(frozen=True, slots=True)
class Tables:
    """The training windows of R runs with D source domains each.

    Args:
        window: (R, M) int64 number in the pool of each training window, domain after domain; 0 beyond a run's own.
        first: (R, D) int64 first training window of each domain.
        count: (R, D) int64 training windows of each domain.
        sizes: ``count`` on the host.
    """

    window: Tensor
    first: Tensor
    count: Tensor
    sizes: tuple[tuple[int, ...], ...]

    def batch(self, pool: Pool, number: Tensor) -> Batch:
        """The training windows ``number`` (R, D, B) of every run, each field with the runs first."""
        place = torch.gather(self.window, 1, number.flatten(1)).reshape(number.shape)
        return Batch(pool.windows(place), pool.y[place], None, number)

    def of(self, pool: Pool, run: int) -> "RunWindows":
        """What ``refresh`` sees of one run."""
        own = self.window[run, : sum(self.sizes[run])]
        domains = torch.arange(self.count.shape[1], device=own.device)
        domain = torch.repeat_interleave(domains, self.count[run], output_size=len(own))
        return RunWindows(pool, own, domain, self.count[run])


@dataclass(frozen=True, slots=True)
class RunWindows:
    """The training windows of one run (implements ``TrainingWindows``)."""

    pool: Pool
    window: Tensor
    domain: Tensor
    count: Tensor

    @property
    def y(self) -> Tensor:
        """(N,) int64 class."""
        return self.pool.y[self.window]

    def windows(self, part: slice) -> Tensor:
        """Raw windows (n, C, T) of a part of the N."""
        return self.pool.windows(self.window[part])


def pool_of(windows: WindowSet, device: torch.device) -> Pool:
    """Copy all windows of a data set to a device, once."""
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(windows.x, 1, 2)))
    return Pool(x.to(device), torch.from_numpy(windows.activity).to(device))


def tables_of(runs: Sequence[Run], device: torch.device) -> Tables:
    """The training windows of runs of one data set that have equally many source domains.

    Raises:
        DataError: a source domain of a run has no training window.
    """
    sizes = tuple(tuple(len(domain) for domain in run.split.train) for run in runs)
    if min(min(own) for own in sizes) == 0:
        raise DataError(f"every source domain needs training windows, got {sizes}")
    windows = [np.concatenate([domain.index for domain in run.split.train]) for run in runs]
    count = torch.tensor(sizes)
    first = torch.cumsum(count, dim=1) - count
    return Tables(table(windows)[0].to(device), first.to(device), count.to(device), sizes)


def table(rows: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as one array filled up with 0, and which entries are real: (R, M) int64 and bool."""
    longest = max(len(row) for row in rows)
    padded = np.zeros((len(rows), longest), np.int64)
    real = np.arange(longest) < np.array([len(row) for row in rows])[:, None]
    padded[real] = np.concatenate(rows)
    return torch.from_numpy(padded), torch.from_numpy(real)
