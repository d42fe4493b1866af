"""The clients of a simulation over real plans and bytes: what a device gets and sends, without the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from wearfleet_models.classifier import Classifier
from wearfleet_protos.plan import InputContract, Plan
from wearfleet_protos.tensors import Digest, decode_tensors, encode_tensors

from wearfleet_cloud.federated.aggregate import Arrays, check_update
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import ClientRound

__all__ = ["DeviceRound", "Engine", "WireClients"]


@dataclass(frozen=True, slots=True)
class DeviceRound:
    """Bytes of the update and of what stays, as a device stores them; and what it reports."""

    update: bytes
    kept: bytes
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
        kept: bytes,
        client: SimulatedClient,
        *,
        round_number: int,
    ) -> DeviceRound:
        """One round of one device; ``kept`` is empty before the first one that counted."""


class WireClients:
    """Implements ``stacked_clients.Runner``.

    Args:
        strategy: with its hyper-parameters.
        model: architecture.
        contract: of its windows.
        seed: of the plan.
        engine: runs plans.
    """

    def __init__(
        self, strategy: Strategy, model: Classifier, contract: InputContract, seed: int, engine: Engine
    ) -> None:
        plan, self._graphs = build_plan(strategy, model, contract, plan_id="simulation", seed=seed)
        self._plan = Plan.from_bytes(plan.to_bytes())
        self.specs = self._plan.tensors
        self._engine = engine

    def run(
        self,
        round_number: int,
        clients: Sequence[SimulatedClient],
        received: Sequence[Arrays],
        kept: Mapping[str, Arrays],
    ) -> list[ClientRound]:
        """As ``Runner.run``, one client after the other."""
        return [
            self._one(round_number, client, tensors, kept.get(client.name, {}))
            for client, tensors in zip(clients, received, strict=True)
        ]

    def _one(self, round_number: int, client: SimulatedClient, tensors: Arrays, kept: Arrays) -> ClientRound:
        down = encode_tensors({spec.name: tensors[spec.name] for spec in self._plan.download_specs()})
        stored = encode_tensors(kept) if kept else b""
        made = self._engine(self._plan, self._graphs, down, stored, client, round_number=round_number)
        update = decode_tensors(made.update)
        check_update(update, self._plan.upload_specs(), client=client.name)
        own = decode_tensors(made.kept, self._plan.local_specs()) if made.kept else {}
        return ClientRound(client.name, update, own, made.metrics, made.num_examples, made.num_steps)
