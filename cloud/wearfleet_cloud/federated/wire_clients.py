"""The clients of a simulation over real plans and bytes: what a device gets and sends, without the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from wearfleet_protos.codecs import FLOAT32, Residual
from wearfleet_protos.plan import Plan
from wearfleet_protos.tensors import Digest, decode_tensors, encode_tensors

from wearfleet_cloud.federated.aggregate import Arrays
from wearfleet_cloud.federated.selection_protocols import VALIDATION
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import ClientRound, Kept

__all__ = ["DeviceRound", "Engine", "Stored", "WireClients"]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a device has on its disk: its own tensors and what its updates owe; empty before a round counted."""

    tensors: bytes = b""
    residual: bytes = b""


@dataclass(frozen=True, slots=True)
class DeviceRound:
    """Bytes of the update, what the device stores once it counts, and what it reports."""

    update: bytes
    stored: Stored
    metrics: Mapping[str, float]
    num_examples: int
    num_steps: int


class Engine(Protocol):
    """A device's training engine; the command line gives the agent's own."""

    def __call__(
        self,
        plan: Plan,
        graphs: Mapping[Digest, bytes],
        tensors: bytes,
        stored: Stored,
        client: SimulatedClient,
        *,
        round_number: int,
    ) -> DeviceRound:
        """One round of one device."""


class WireClients:
    """Implements ``stacked_clients.Runner``.

    Args:
        plan: what clients do.
        graphs: of the plan.
        engine: runs plans.
    """

    def __init__(self, plan: Plan, graphs: Mapping[Digest, bytes], engine: Engine) -> None:
        self._plan, self._graphs = Plan.from_bytes(plan.to_bytes()), graphs
        self.specs, self._format = self._plan.tensors, self._plan.update_format()
        self._engine = engine

    def run(
        self,
        round_number: int,
        clients: Sequence[SimulatedClient],
        received: Sequence[Arrays],
        kept: Mapping[str, Kept],
    ) -> list[ClientRound]:
        """As ``Runner.run``, one client after the other."""
        return [
            self._one(round_number, client, tensors, kept.get(client.name, Kept()))
            for client, tensors in zip(clients, received, strict=True)
        ]

    def _one(self, round_number: int, client: SimulatedClient, tensors: Arrays, kept: Kept) -> ClientRound:
        down = encode_tensors({spec.name: tensors[spec.name] for spec in self._plan.download_specs()})
        stored = Stored(encode_tensors(kept.tensors) if kept.tensors else b"", kept.residual.to_bytes())
        made = self._engine(self._plan, self._graphs, down, stored, client, round_number=round_number)
        update = self._format.decode(made.update)
        lossless = self._format.codec == FLOAT32
        size = self._format.most_bytes(round_number) if lossless else len(made.update)
        stays = made.stored
        own = decode_tensors(stays.tensors, self._plan.local_specs()) if stays.tensors else {}
        keeps = Kept(own, Residual.from_bytes(stays.residual))
        metrics = {**made.metrics, **self._validated(down, stored, client, round_number)}
        return ClientRound(client.name, update, size, keeps, metrics, made.num_examples, made.num_steps)

    def _validated(
        self, down: bytes, stored: Stored, client: SimulatedClient, round_number: int
    ) -> dict[str, float]:
        """What the same round, run again, measures on the validation part: a plan measures on one part only."""
        if client.validation is None:
            return {}
        measured = replace(client, holdout=client.validation)
        made = self._engine(self._plan, self._graphs, down, stored, measured, round_number=round_number)
        phases = {phase.name for phase in self._plan.phases if phase.loop.split == "holdout"}
        return {VALIDATION + n: value for n, value in made.metrics.items() if n.rpartition("/")[0] in phases}
