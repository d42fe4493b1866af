"""The training loop: data on the device, indices drawn there, and no reading of values between evaluations."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from wearfleet_models import randomness
from wearfleet_protos.errors import DataError

from wearfleet_cloud.algorithms.base import Algorithm, Batch, State
from wearfleet_cloud.training.sampling import BLOCK, pass_steps, sampler

__all__ = ["INDICES", "REFRESHES", "STEPS", "Resident", "advance", "resident"]

INDICES, STEPS, REFRESHES = 1, 2, 3
"""What a key derived from the key of a run is for."""


@dataclass(frozen=True, slots=True)
class Resident:
    """All training windows of the source domains on one device.

    Args:
        x: (N, T, C) float32 raw units, domain after domain; channels innermost, the order convolutions like.
        y: (N,) int64.
        domain: (N,) int64 number of the source domain.
        first: (D,) int64 first window of each domain.
        count: (D,) int64 windows of each domain.
        sizes: ``count`` on the host.
    """

    x: Tensor
    y: Tensor
    domain: Tensor
    first: Tensor
    count: Tensor
    sizes: tuple[int, ...]

    def batch(self, index: Tensor) -> Batch:
        """The windows at ``index`` (D, B)."""
        return Batch(self.x[index].transpose(-1, -2), self.y[index], None, index)

    def windows(self, part: slice) -> Tensor:
        """Raw windows (n, C, T) of a part of the N."""
        return self.x[part].transpose(-1, -2)


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
    domain = torch.repeat_interleave(torch.arange(len(counts)), count)
    return Resident(
        x.to(device), y.to(device), domain.to(device), first.to(device), count.to(device), tuple(counts)
    )


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
        The state afterwards, and the mean of every metric over the steps that gave it, () each, still on the device.
    """
    size = algorithm.shape(batch)[1]
    draws = sampler(
        algorithm.info.sampling,
        randomness.derive(key, INDICES),
        size,
        first=data.first,
        count=data.count,
        sizes=data.sizes,
    )
    in_a_pass = pass_steps(algorithm.info.sampling, data.sizes, size)
    step_key, refresh_key = randomness.derive(key, STEPS), randomness.derive(key, REFRESHES)
    sums: dict[str, Tensor] = {}
    times: Counter[str] = Counter()
    for step in steps:
        if step == steps.start or step % BLOCK == 0:
            begin = step - step % BLOCK
            keys = randomness.derive(step_key, torch.arange(begin, begin + BLOCK, device=key.device))
        if algorithm.refresh_at(step, in_a_pass):
            state = algorithm.refresh(state, data, hyper, randomness.derive(refresh_key, step))
        drawn = data.batch(draws.at(step))
        state, metrics = algorithm.step_at(step, in_a_pass)(state, drawn, hyper, keys[step % BLOCK])
        sums = {**sums, **{name: sums.get(name, 0.0) + value for name, value in metrics.items()}}
        times.update(metrics.keys())  # of a mapping it would add the values
        on_step(step + 1)
    return state, {name: value / times[name] for name, value in sums.items()}
