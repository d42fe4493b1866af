"""The clients of a round stacked: their steps are one call of ``torch.func.vmap``; who has no windows left rests.

They are the steps that the plan is compiled from, on the same windows in the same order with the same random keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap
from wearfleet_models.classifier import Classifier
from wearfleet_protos.batching import part_of, rng_key
from wearfleet_protos.codecs import FLOAT32, Residual, UpdateFormat
from wearfleet_protos.privacy import protected
from wearfleet_protos.records import Source, expected_batch, steps_of
from wearfleet_protos.tensors import TensorSpec, constant_start
from wearfleet_protos.windowing import LabelledWindows

from wearfleet_cloud.federated.aggregate import Arrays
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.client_program import ClientPhase
from wearfleet_cloud.federated.plan_layers import with_plan_layers
from wearfleet_cloud.federated.selection_protocols import VALIDATION
from wearfleet_cloud.federated.simulated_clients import SimulatedClient

__all__ = ["ClientRound", "Kept", "Runner", "StackedClients", "downloaded_specs", "seeded_source"]

Tensors = dict[str, Tensor]

_NOISE: Final = 0x10CA
"""Keeps the noise of clients apart from other random numbers."""
_RECORDS: Final = 0xD95
"""The same for secret batches and the noise of steps."""


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What a client has from its last round that counted: its own tensors, and what its updates still owe."""

    tensors: Arrays = field(default_factory=dict)
    residual: Residual = field(default_factory=Residual)


@dataclass(frozen=True, slots=True, eq=False)
class ClientRound:
    """What a client's round gave.

    Args:
        client: its name.
        update: uploaded tensors, as the service decodes them.
        sent_bytes: payload of the update.
        kept: what stays on the device, once the update counts.
        metrics: ``phase/metric`` to value.
        num_examples: training windows.
        num_steps: steps of phases that change something.
    """

    client: str
    update: Arrays
    sent_bytes: int
    kept: Kept
    metrics: Mapping[str, float]
    num_examples: int
    num_steps: int


class Runner(Protocol):
    """Runs the clients of a round."""

    specs: tuple[TensorSpec, ...]

    def run(
        self,
        round_number: int,
        clients: Sequence[SimulatedClient],
        received: Sequence[Arrays],
        kept: Mapping[str, Kept],
    ) -> list[ClientRound]:
        """One round, from what each client received and what it kept of its last one, by its name.

        Where all clients have a validation part, phases over the held-out part are measured on it too, with metrics
        ``validation/phase/metric``.
        """


def seeded_source(seed: int, round_number: int, client: str) -> Source:
    """What a simulated client draws secret batches and noise from; it follows from the seed, so it protects nobody."""
    key = rng_key(seed, round_number, _RECORDS, crc32(client.encode()))
    return np.random.Generator(np.random.PCG64(key))


def downloaded_specs(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """As ``Plan.download_specs``, in the order of ``specs``."""
    return tuple(s for s in specs if s.origin in ("global", "local") and not s.copy_of)


class StackedClients:
    """Implements :class:`Runner`.

    Args:
        strategy: with its hyper-parameters.
        model: architecture.
        seed: as the plan's.
        at_once: clients that are stacked; memory grows with it.
        device: of torch.
    """

    def __init__(
        self, strategy: Strategy, model: Classifier, seed: int, *, at_once: int = 32, device: str = "cpu"
    ) -> None:
        self._program = strategy.client(with_plan_layers(model).to(device))
        self.specs = self._program.tensors
        upload = strategy.info.upload()
        sent = [s for s in self.specs if s.role in upload.roles and s.group in upload.groups]
        self._privacy = strategy.privacy
        self._format = UpdateFormat(tuple(sent), strategy.compression.update_codec, seed)
        self._sent = [s.name for s in sent]
        self._kept = [s.name for s in self.specs if s.origin == "local"]
        self._seed, self._at_once, self._device = seed, at_once, device

    def run(
        self,
        round_number: int,
        clients: Sequence[SimulatedClient],
        received: Sequence[Arrays],
        kept: Mapping[str, Kept],
    ) -> list[ClientRound]:
        """As ``Runner.run``."""
        results = []
        for begin in range(0, len(clients), self._at_once):
            chunk = slice(begin, begin + self._at_once)
            results += self._run_stack(round_number, clients[chunk], received[chunk], kept)
        return results

    def _run_stack(
        self,
        round_number: int,
        clients: Sequence[SimulatedClient],
        received: Sequence[Arrays],
        kept: Mapping[str, Kept],
    ) -> list[ClientRound]:
        before = [kept.get(client.name, Kept()) for client in clients]
        limits = [client.max_lora_rank for client in clients]
        state = self._start(received, [had.tensors for had in before], limits)
        start = {name: state[name].clone() for name in self._sent}
        sums: list[dict[str, float]] = [{} for _ in clients]
        steps = np.zeros(len(clients), np.int64)
        sources = [seeded_source(self._seed, round_number, client.name) for client in clients]
        for index, phase in enumerate(self._program.phases):
            windows = [part_of(phase.loop.split, client.train, client.holdout) for client in clients]
            validation = [client.validation for client in clients if client.validation is not None]
            if phase.loop.split == "holdout" and validation:
                _, metrics = self._phase(phase, dict(state), validation, (round_number, index), sources)
                _note(sums, VALIDATION + phase.name, metrics)
            made, metrics = self._phase(phase, state, windows, (round_number, index), sources)
            steps += made
            _note(sums, phase.name, metrics)
        update = {name: (state[name] - start[name]).cpu().numpy() for name in self._sent}
        own = {name: state[name].cpu().numpy() for name in self._kept}
        results = []
        for row, one in enumerate(clients):
            trained = self._protected(one.name, {n: array[row] for n, array in update.items()}, round_number)
            stays = {name: array[row] for name, array in own.items()}
            sent, size, residual = self._send(one.name, trained, before[row].residual, round_number)
            numbers = sums[row], len(one.train), int(steps[row])
            results.append(ClientRound(one.name, sent, size, Kept(stays, residual), *numbers))
        return results

    def _protected(self, client: str, update: Arrays, round_number: int) -> Arrays:
        """The update with a client's own clip and noise; the noise comes from the seed, so it protects nobody."""
        options = self._privacy
        if not options.device_clip:
            return update
        key = rng_key(self._seed, round_number, _NOISE, crc32(client.encode()))
        generator = np.random.Generator(np.random.PCG64(key))
        return protected(update, options.device_clip, options.device_noise, generator)

    def _send(
        self, client: str, update: Arrays, residual: Residual, round_number: int
    ) -> tuple[Arrays, int, Residual]:
        """An update as it arrives, its bytes, and what it leaves behind; without loss it is not coded at all."""
        if self._format.codec == FLOAT32:
            return update, self._format.most_bytes(round_number), residual
        encoded = self._format.encode(update, residual, round_number=round_number, client=client)
        return self._format.decode(encoded.data), len(encoded.data), encoded.residual

    def _start(self, received: Sequence[Arrays], kept: Sequence[Arrays], limits: Sequence[int]) -> Tensors:
        """First values, (clients, ...) each; ``limits`` are the clients' highest ranks."""
        state: Tensors = {}
        for spec in self.specs:
            own = [k[spec.name] if spec.origin == "local" and spec.name in k else None for k in kept]
            if spec.copy_of:
                common = state[spec.copy_of].clone()
            elif spec.origin in ("zeros", "ones"):
                made = {limit: constant_start(spec, limit) for limit in set(limits)}
                common = self._stacked([made[limit] for limit in limits])
            else:
                common = self._stacked([tensors[spec.name] for tensors in received])
            for row, array in enumerate(own):
                if array is not None:
                    common[row] = torch.from_numpy(np.array(array)).to(self._device)
            state[spec.name] = common
        return state

    def _stacked(self, arrays: Sequence[NDArray[np.generic]]) -> Tensor:
        """(clients, ...); clients that share an array share its transfer."""
        if all(array is arrays[0] for array in arrays):
            value = torch.from_numpy(np.array(arrays[0])).to(self._device)
            return value.expand(len(arrays), *value.shape).clone()
        return torch.from_numpy(np.stack(arrays)).to(self._device)

    def _phase(
        self,
        phase: ClientPhase,
        state: Tensors,
        windows: Sequence[LabelledWindows],
        place: tuple[int, int],
        sources: Sequence[Source],
    ) -> tuple[NDArray[np.int64], list[dict[str, float]]]:
        """Run a phase for all; changes ``state``. Returns the steps that changed it, and the metrics of each client."""
        round_number, index = place
        plans = [
            steps_of(phase.loop, self._seed, round_number, len(w), source)
            for w, source in zip(windows, sources, strict=True)
        ]
        if phase.when:
            runs = state[phase.when] > 0.5
            plans = [plan if run else [] for plan, run in zip(plans, runs.tolist(), strict=True)]
        scalars = {n: torch.tensor(v, dtype=torch.float32, device=self._device) for n, v in phase.scalars}
        totals: dict[str, Tensor] = {}
        changes = False
        for step in range(max(map(len, plans))):
            active = [client for client, plan in enumerate(plans) if step < len(plan)]
            rows = torch.tensor(active, device=self._device)
            everyone = len(active) == len(plans)
            stacked = state if everyone else {name: tensor[rows] for name, tensor in state.items()}
            batch = self._batch([(windows[c], plans[c][step]) for c in active], phase.loop.batch_size)
            if phase.noise:
                sizes = [expected_batch(phase.loop, len(windows[c])) for c in active]
                batch |= self._drawn([sources[c] for c in active], sizes, phase.noise)
            key = torch.tensor(rng_key(self._seed, round_number, index, step), device=self._device)
            results = _call(phase, {**stacked, **batch}, {**scalars, "rng": key})
            for name, value in results.items():
                if name in state:
                    changes = True
                    state[name] = value if everyone else state[name].index_copy(0, rows, value)
                else:
                    zeros = torch.zeros(len(plans), device=self._device)
                    totals[name] = totals.get(name, zeros).index_add(0, rows, value)
        made = np.array([len(plan) if changes else 0 for plan in plans], np.int64)
        values = {name: total.tolist() for name, total in totals.items()}
        return made, [{name: row[client] for name, row in values.items()} for client in range(len(plans))]

    def _drawn(self, sources: Sequence[Source], sizes: Sequence[float], numbers: int) -> Tensors:
        """Noise (clients, P) and mean size (clients,) of a step's secret batches."""
        noise = np.stack([source.standard_normal(numbers) for source in sources]).astype(np.float32)
        made = {"noise": noise, "expected": np.array(sizes, np.float32)}
        return {name: torch.from_numpy(array).to(self._device) for name, array in made.items()}

    def _batch(self, chosen: Sequence[tuple[LabelledWindows, NDArray[np.int64]]], size: int) -> Tensors:
        """The next windows of each client, (clients, B, ...), padded with zeros of weight 0."""
        shape = chosen[0][0].x.shape[1:]
        x = np.zeros((len(chosen), size, *shape), np.float32)
        y = np.zeros((len(chosen), size), np.int64)
        weight = np.zeros((len(chosen), size), np.float32)
        for client, (windows, rows) in enumerate(chosen):
            x[client, : len(rows)], y[client, : len(rows)] = windows.x[rows], windows.y[rows]
            weight[client, : len(rows)] = 1.0
        made = {"x": x, "y": y, "weight": weight}
        return {name: torch.from_numpy(array).to(self._device) for name, array in made.items()}


def _note(sums: Sequence[dict[str, float]], phase: str, metrics: Sequence[Mapping[str, float]]) -> None:
    """Add the metrics of a phase to those of every client."""
    for own, values in zip(sums, metrics, strict=True):
        own |= {f"{phase}/{name}": value for name, value in values.items()}


def _call(phase: ClientPhase, each: Tensors, common: Tensors) -> Mapping[str, Tensor]:
    places = {**dict.fromkeys(each, 0), **dict.fromkeys(common)}
    with torch.no_grad():
        results: Mapping[str, Tensor] = vmap(phase.step, in_dims=(places,))({**each, **common})
    return results
