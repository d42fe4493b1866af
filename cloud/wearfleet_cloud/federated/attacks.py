"""Simulated attackers: what a bad client does to its windows or its update, to measure what a rule bears.

Nothing here attacks anything: clients of a simulation are changed, always the same ones for a seed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.batching import rng_key
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import ClientRound, Kept, Runner

__all__ = ["ATTACKS", "Attack", "Attackers", "chosen_attackers", "flipped", "spoilt"]

ATTACKS: Final[Mapping[str, str]] = {
    "label-flip": "learns that class c is class K - 1 - c",
    "sign-flip": "sends the negative of what it learned",
    "scaled": "sends -8 times what it learned, which stays within the norm that is refused",
    "nan": "sends NaN",
    "inflated": "flips labels and claims 1000 times its windows",
    "replay": "sends its first update again in every round",
}
"""By name: what an attacker does."""

_STREAM: Final = 0xBAD
_SCALE: Final = -8.0
_CLAIM: Final = 1000


@dataclass(frozen=True, slots=True)
class Attack:
    """What is simulated.

    Args:
        attack: a name of ``ATTACKS``; ``none`` for honest clients.
        attacker_share: share of the clients that attack, rounded down to whole ones; 0 to below 1.

    Raises:
        ConfigError: an unknown attack, a share out of range, or one without the other.
    """

    attack: str = "none"
    attacker_share: float = 0.0

    def __post_init__(self) -> None:
        if self.attack != "none" and self.attack not in ATTACKS:
            raise ConfigError(f"unknown attack {self.attack!r}; known: none, {', '.join(ATTACKS)}")
        if not 0.0 <= self.attacker_share < 1.0:
            raise ConfigError(f"attacker_share must be at least 0 and below 1, got {self.attacker_share}")
        if (self.attack == "none") != (self.attacker_share == 0.0):
            raise ConfigError(
                f"attack={self.attack} and attacker_share={self.attacker_share:g} contradict each other; give both"
            )


def chosen_attackers(names: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """Who attacks: so large a share of the clients, rounded down, the same ones for a seed."""
    ordered = sorted(names)
    generator = np.random.Generator(np.random.PCG64(rng_key(seed, 0, _STREAM, 0)))
    rows = generator.permutation(len(ordered))[: int(share * len(ordered) + 1e-9)]
    return frozenset(ordered[row] for row in rows)


def flipped(client: SimulatedClient, classes: int) -> SimulatedClient:
    """A client that learns wrong classes: c becomes K - 1 - c. It is measured on the right ones.

    Args:
        client: honest.
        classes: K.
    """
    return replace(client, train=replace(client.train, y=classes - 1 - client.train.y))


def spoilt(attack: str, update: Arrays, specs: Sequence[TensorSpec], first: Arrays) -> Arrays:
    """What an attacker sends instead of its update.

    Trained tensors are changed; statistics of normalisation and counters stay, so that only the attack is measured.

    Args:
        attack: a name of ``ATTACKS``.
        update: what it would send.
        specs: tensors with their roles.
        first: the first update that it sent.
    """
    if attack == "replay":
        return first
    changes: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
        "sign-flip": np.negative,
        "scaled": lambda array: np.asarray(_SCALE * array, array.dtype),
        "nan": lambda array: np.full_like(array, np.nan),
    }
    if attack not in changes:
        return update
    apart = {s.name for s in specs if s.role in (TensorRole.NORM_STAT, TensorRole.COUNTER)}
    return {name: array if name in apart else changes[attack](array) for name, array in update.items()}


class Attackers:
    """Implements ``stacked_clients.Runner``: honest training, then what attackers make of it.

    Args:
        runner: of honest clients.
        attack: what attackers do.
        names: who they are.
        classes: K of the windows.
    """

    def __init__(self, runner: Runner, attack: str, names: frozenset[str], classes: int) -> None:
        self._runner, self._attack, self._names, self._classes = runner, attack, names, classes
        self._first: dict[str, Arrays] = {}
        self.specs = runner.specs

    def run(
        self,
        round_number: int,
        clients: Sequence[SimulatedClient],
        received: Sequence[Arrays],
        kept: Mapping[str, Kept],
    ) -> list[ClientRound]:
        """As ``Runner.run``."""
        poisoned = [self._with_own_windows(client) for client in clients]
        return [self._sent(result) for result in self._runner.run(round_number, poisoned, received, kept)]

    def _with_own_windows(self, client: SimulatedClient) -> SimulatedClient:
        learns_wrong = self._attack in ("label-flip", "inflated") and client.name in self._names
        return flipped(client, self._classes) if learns_wrong else client

    def _sent(self, result: ClientRound) -> ClientRound:
        if result.client not in self._names:
            return result
        first = self._first.setdefault(result.client, result.update)
        claimed = result.num_examples * (_CLAIM if self._attack == "inflated" else 1)
        return replace(
            result, update=spoilt(self._attack, result.update, self.specs, first), num_examples=claimed
        )
