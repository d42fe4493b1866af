"""The clients of a simulation spread over a Ray cluster: each machine stacks those that it gets.

A client's windows travel once; tensors that all clients receive travel once a round.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from wearfleet_models.classifier import Classifier

from wearfleet_cloud.federated.aggregate import Arrays
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import ClientRound, Kept, StackedClients

__all__ = ["RayClients"]


class RayClients:
    """Implements ``stacked_clients.Runner``.

    Args:
        ray: the module, connected to a cluster (``ray_cluster``).
        strategy: with its hyper-parameters.
        model: architecture.
        seed: as the plan's.
        at_once: clients that one worker stacks.
        device: of torch, on the workers; one GPU each unless it is cpu.
    """

    def __init__(
        self,
        ray: ModuleType,
        strategy: Strategy,
        model: Classifier,
        seed: int,
        *,
        at_once: int = 32,
        device: str = "cpu",
    ) -> None:
        self.specs = StackedClients(strategy, model, seed, at_once=at_once).specs
        self._ray, self._at_once = ray, at_once
        gpus = int(device != "cpu")
        worker = ray.remote(_Worker).options(num_cpus=1, num_gpus=gpus)
        slots = ray.cluster_resources().get("GPU" if gpus else "CPU", 1.0)
        self._workers = [
            worker.remote(strategy, model, seed, at_once, device) for _ in range(max(1, int(slots)))
        ]
        self._windows: dict[str, Any] = {}

    def run(
        self,
        round_number: int,
        clients: Sequence[SimulatedClient],
        received: Sequence[Arrays],
        kept: Mapping[str, Kept],
    ) -> list[ClientRound]:
        """As ``Runner.run``; workers take the stacks in turn."""
        tensors = {id(arrays): self._ray.put(arrays) for arrays in received}
        pending = []
        for index, begin in enumerate(range(0, len(clients), self._at_once)):
            chunk = slice(begin, begin + self._at_once)
            own = {client.name: kept[client.name] for client in clients[chunk] if client.name in kept}
            parts = [self._stored(client) for client in clients[chunk]]
            parts += [tensors[id(arrays)] for arrays in received[chunk]]
            worker = self._workers[index % len(self._workers)]
            pending.append(worker.run.remote(round_number, own, *parts))
        return [result for results in self._ray.get(pending) for result in results]

    def _stored(self, client: SimulatedClient) -> Any:
        """Where the cluster keeps a client's windows."""
        if client.name not in self._windows:
            self._windows[client.name] = self._ray.put(client)
        return self._windows[client.name]


class _Worker:
    """A process of the cluster; what it is given by reference comes as positional arguments."""

    def __init__(self, strategy: Strategy, model: Classifier, seed: int, at_once: int, device: str) -> None:
        self._clients = StackedClients(strategy, model, seed, at_once=at_once, device=device)

    def run(
        self, round_number: int, kept: Mapping[str, Kept], *parts: SimulatedClient | Arrays
    ) -> list[ClientRound]:
        clients: Any = parts[: len(parts) // 2]
        received: Any = parts[len(parts) // 2 :]
        return self._clients.run(round_number, clients, received, kept)
