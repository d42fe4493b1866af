"""The reference of the plan: a client's round run directly in torch.

It takes the same windows in the same order with the same random keys as a device that runs the plan, with the model's
own layers and no graph in between. Tests hold the two against each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from wearfleet_models.classifier import Classifier
from wearfleet_protos.batching import part_of, rng_key
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.records import SecretSource, Source, expected_batch, steps_of
from wearfleet_protos.tensors import NO_RANK_LIMIT, TensorSpec, constant_start
from wearfleet_protos.windowing import LabelledWindows

from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.client_program import ClientPhase

__all__ = ["ClientResult", "run_client"]

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ClientResult:
    """State after a round, what is uploaded from it, and the metrics as ``phase/metric``."""

    state: dict[str, NDArray[np.generic]]
    update: dict[str, NDArray[np.generic]]
    metrics: dict[str, float]
    num_examples: int


def run_client(
    strategy: Strategy,
    model: Classifier,
    downloaded: Mapping[str, NDArray[np.generic]],
    persisted: Mapping[str, NDArray[np.generic]],
    windows: Mapping[str, LabelledWindows],
    *,
    seed: int,
    round_number: int,
    source: Source | None = None,
    max_lora_rank: int = NO_RANK_LIMIT,
) -> ClientResult:
    """One round of one client.

    Args:
        strategy: with its hyper-parameters.
        model: architecture.
        downloaded: global tensors.
        persisted: local tensors of this client's last round; may be empty.
        windows: ``train`` and ``holdout``.
        seed: of the plan.
        round_number: from 1.
        source: of secret batches and their noise; None for the operating system's.
        max_lora_rank: highest rank of low-rank factors that the client trains.

    Raises:
        ConfigError: a split has no windows.
    """
    program = strategy.client(model)
    drawn = SecretSource() if source is None else source
    start: Tensors = {}
    for spec in program.tensors:
        start[spec.name] = _first_value(spec, downloaded, persisted, start, max_lora_rank)
    state = dict(start)
    metrics: dict[str, float] = {}
    for index, phase in enumerate(program.phases):
        if phase.when and not float(state[phase.when]) > 0.5:
            continue
        chosen = part_of(phase.loop.split, windows["train"], windows["holdout"])
        state, sums = _run_phase(phase, state, chosen, (seed, round_number, index), drawn)
        metrics |= {f"{phase.name}/{name}": value for name, value in sums.items()}
    upload = strategy.info.upload()
    sent = [s.name for s in program.tensors if s.role in upload.roles and s.group in upload.groups]
    return ClientResult(
        {name: tensor.numpy() for name, tensor in state.items()},
        {name: (state[name] - start[name]).numpy() for name in sent},
        metrics,
        len(windows["train"].y),
    )


def _first_value(
    spec: TensorSpec,
    downloaded: Mapping[str, NDArray[np.generic]],
    persisted: Mapping[str, NDArray[np.generic]],
    before: Tensors,
    max_lora_rank: int,
) -> Tensor:
    if spec.origin == "local" and spec.name in persisted:
        return torch.from_numpy(np.array(persisted[spec.name]))
    if spec.copy_of:
        return before[spec.copy_of]
    if spec.origin in ("zeros", "ones"):
        return torch.from_numpy(constant_start(spec, max_lora_rank))
    return torch.from_numpy(np.array(downloaded[spec.name]))


def _run_phase(
    phase: ClientPhase,
    state: Tensors,
    windows: LabelledWindows,
    place: tuple[int, int, int],
    source: Source,
) -> tuple[Tensors, dict[str, float]]:
    seed, round_number, index = place
    if not len(windows.y):
        raise ConfigError(f"phase {phase.name} has no windows in split {phase.loop.split}")
    scalars = {name: torch.tensor(value, dtype=torch.float32) for name, value in phase.scalars}
    sums: dict[str, float] = {}
    size = torch.tensor(expected_batch(phase.loop, len(windows.y)), dtype=torch.float32)
    for step, rows in enumerate(steps_of(phase.loop, seed, round_number, len(windows.y), source)):
        key = torch.tensor(rng_key(seed, round_number, index, step), dtype=torch.int64)
        noise = torch.from_numpy(source.standard_normal(phase.noise).astype(np.float32))
        drawn = {"rng": key, "noise": noise, "expected": size}
        results = phase.step({**state, **scalars, **_batch(windows, rows, phase.loop.batch_size), **drawn})
        state = {name: results.get(name, tensor) for name, tensor in state.items()}
        for name, value in results.items():
            if name not in state:
                sums[name] = sums.get(name, 0.0) + float(value)
    return state, sums


def _batch(windows: LabelledWindows, rows: NDArray[np.int64], size: int) -> Tensors:
    """The chosen windows, padded to the batch size with zeros of weight 0."""
    x = np.zeros((size, *windows.x.shape[1:]), dtype=np.float32)
    y = np.zeros(size, dtype=np.int64)
    weight = np.zeros(size, dtype=np.float32)
    x[: len(rows)], y[: len(rows)], weight[: len(rows)] = windows.x[rows], windows.y[rows], 1.0
    return {"x": torch.from_numpy(x), "y": torch.from_numpy(y), "weight": torch.from_numpy(weight)}
