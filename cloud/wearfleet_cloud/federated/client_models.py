"""What the server keeps of every client, for strategies that make each client a model of its own.

All of it is the strategy's state: arrays with one row a client, in the order of the clients' names. So a model for a
client is there again after a restart, an absent client still counts for the others, and a new one gets a row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from wearfleet_cloud.federated.aggregate import Arrays

__all__ = ["ClientModels", "mixed"]

Array = NDArray[Any]

_LAST: Final = "last/"
_OWN: Final = "own/"
_FEATURE: Final = "feature/"
_BLOCK: Final = 65_536
"""Numbers of a model that are mixed at a time: N times 512 KiB of float64."""


@dataclass(frozen=True, slots=True, eq=False)
class ClientModels:
    """Rows of N clients.

    Args:
        clients: their names, sorted.
        aggregations: rounds that counted so far.
        examples: (N,) int64 training windows, of the client's last round.
        seen: (N,) int64 the aggregation it took part in last, from 1.
        last: tensor -> (N, ...) what the client trained last.
        own: tensor -> (N, ...) what it receives next; empty while all receive the global tensors.
        features: name -> (N, ...) what the similarity of clients is measured on.
    """

    clients: tuple[str, ...] = ()
    aggregations: int = 0
    examples: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    seen: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    last: Mapping[str, Array] = field(default_factory=dict)
    own: Mapping[str, Array] = field(default_factory=dict)
    features: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def from_state(cls, state: Arrays) -> Self:
        """Inverse of :meth:`to_state`; without a state nobody is known. Nothing is copied."""
        if not state:
            return cls()
        groups = {
            prefix: {
                name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)
            }
            for prefix in (_LAST, _OWN, _FEATURE)
        }
        return cls(
            _names(state["clients"]),
            int(state["aggregations"]),
            state["examples"],
            state["seen"],
            groups[_LAST],
            groups[_OWN],
            groups[_FEATURE],
        )

    def to_state(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for ``Averaged.state``."""
        return {
            "clients": np.frombuffer("\n".join(self.clients).encode(), np.uint8),
            "aggregations": np.asarray(self.aggregations, np.int64),
            "examples": self.examples,
            "seen": self.seen,
            **{_LAST + name: array for name, array in self.last.items()},
            **{_OWN + name: array for name, array in self.own.items()},
            **{_FEATURE + name: array for name, array in self.features.items()},
        }

    def own_of(self, client: str) -> dict[str, NDArray[np.generic]]:
        """What a client receives instead of the global tensors; empty when it has nothing of its own."""
        if not self.own or client not in self.clients:
            return {}
        row = self.clients.index(client)
        return {name: array[row] for name, array in self.own.items()}

    def with_clients(self, names: Iterable[str]) -> Self:
        """With rows for these clients too, zero where they are new; every array is a copy."""
        everyone = tuple(sorted({*self.clients, *names}))
        rows = [everyone.index(name) for name in self.clients]

        def grown(array: Array) -> Array:
            larger = np.zeros((len(everyone), *array.shape[1:]), array.dtype)
            larger[rows] = array
            return larger

        return replace(
            self,
            clients=everyone,
            examples=grown(self.examples),
            seen=grown(self.seen),
            last={name: grown(array) for name, array in self.last.items()},
            features={name: grown(array) for name, array in self.features.items()},
        )

    def rows(self, names: Iterable[str]) -> list[int]:
        """Places of clients."""
        return [self.clients.index(name) for name in names]


def mixed(weights: Array, last: Mapping[str, Array]) -> dict[str, Array]:
    """Every client's mixture of the models of all: theta_i = sum_j w_ij theta_j, slice by slice, each one product.

    Args:
        weights: (N, N) float64.
        last: tensor -> (N, ...).

    Returns:
        The arrays of ``last`` mixed, in their types; summed in float64.
    """
    results = {}
    for name, array in last.items():
        flat = array.reshape(len(array), -1)
        result = np.empty_like(flat)
        for begin in range(0, flat.shape[1], _BLOCK):
            result[:, begin : begin + _BLOCK] = weights @ flat[:, begin : begin + _BLOCK].astype(np.float64)
        results[name] = result.reshape(array.shape)
    return results


def _names(packed: NDArray[np.generic]) -> tuple[str, ...]:
    return tuple(packed.tobytes().decode().split("\n"))
