"""The training loop: data on the device, indices drawn there, and no reading of values between evaluations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from wearfleet_models import randomness
from wearfleet_protos.errors import DataError

from wearfleet_cloud.algorithms.base import Algorithm, Batch, State

__all__ = ["Resident", "advance", "resident"]

_BLOCK = 64  # steps whose indices and keys are drawn by one call
_INDICES, _STEPS = 1, 2  # what a key of a run is for


@dataclass(frozen=True, slots=True)
class Resident:
    """All training windows of the source domains on one device.

    Args:
        x: (N, T, C) float32 raw units, domain after domain; channels innermost, the order convolutions like.
        y: (N,) int64.
        first: (D,) int64 first window of each domain.
        count: (D,) int64 windows of each domain.
    """

    x: Tensor
    y: Tensor
    first: Tensor
    count: Tensor

    def batch(self, index: Tensor) -> Batch:
        """The windows at ``index`` (D, B)."""
        return Batch(self.x[index].transpose(-1, -2), self.y[index])

    def indices(self, key: Tensor, block: int, size: int) -> Tensor:
        """Windows of a block of steps, drawn uniformly with replacement: (64, D, size) int64."""
        shape = (_BLOCK, len(self.count), size)
        drawn = randomness.integers(randomness.derive(key, block), 0, shape, self.count[:, None])
        return drawn + self.first[:, None]


def resident(
    domains: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]], device: torch.device
) -> Resident:
    """Copy the training windows of the source domains to a device, once.

    Args:
        domains: (x (N, C, T), y (N,)) of each source domain.
        device: where training runs.

    Raises:
        DataError: no domain, or one without windows.
    """
    counts = [len(y) for _, y in domains]
    if not counts or min(counts) == 0:
        raise DataError(f"every source domain needs training windows, got {counts or 'no domain'}")
    x = torch.from_numpy(np.concatenate([np.moveaxis(x, 1, 2) for x, _ in domains])).contiguous()
    y = torch.from_numpy(np.concatenate([y for _, y in domains])).long()
    count = torch.tensor(counts)
    first = torch.cumsum(count, dim=0) - count
    return Resident(x.to(device), y.to(device), first.to(device), count.to(device))


def advance(
    algorithm: Algorithm,
    state: State,
    data: Resident,
    hyper: Mapping[str, Tensor],
    *,
    key: Tensor,
    steps: range,
    batch: int,
    on_step: Callable[[int], None],
) -> tuple[State, dict[str, Tensor]]:
    """Make consecutive steps and read nothing back from the device.

    Batches and random numbers depend on key and step alone, so a run in pieces is the same run.

    Args:
        algorithm: whose steps.
        state: before ``steps.start``.
        data: training windows.
        hyper: "lr" and those of the algorithm, () float32.
        key: () int64 key of the run.
        steps: numbers of the steps to make, at least one.
        batch: windows a domain.
        on_step: called with the number of steps made so far, after each.

    Returns:
        The state afterwards, and the mean of every metric over the steps, () each, still on the device.
    """
    index_key, step_key = randomness.derive(key, _INDICES), randomness.derive(key, _STEPS)
    sums: dict[str, Tensor] = {}
    for step in steps:
        if step == steps.start or step % _BLOCK == 0:
            indices = data.indices(index_key, step // _BLOCK, batch)
            begin = step - step % _BLOCK
            keys = randomness.derive(step_key, torch.arange(begin, begin + _BLOCK, device=key.device))
        drawn = data.batch(indices[step % _BLOCK])
        state, metrics = algorithm.step(state, drawn, hyper, keys[step % _BLOCK])
        sums = {name: sums[name] + value if sums else value for name, value in metrics.items()}
        on_step(step + 1)
    return state, {name: value / len(steps) for name, value in sums.items()}
