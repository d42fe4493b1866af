"""Clients of a simulation from the windows of a data set: each person one, or clients whose labels are skewed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.batching import rng_key
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import NO_RANK_LIMIT
from wearfleet_protos.windowing import LabelledWindows, split_again_by_time, split_by_time

if TYPE_CHECKING:
    from wearfleet_cloud.data.prepared import Prepared

__all__ = ["SimulatedClient", "label_skew", "people", "split_hash", "with_ranks"]

_STREAM: Final = 0x51A7
_HOLDOUT: Final = 0.3
_VALIDATION: Final = 3 / 7
"""Share of what is not held out: 30 % of all."""
_FEWEST_OF_FAIR_SHARE: Final = 0.5
_MOST_DRAWS: Final = 10_000


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedClient:
    """A client.

    Args:
        name: identity.
        train: windows to learn from.
        holdout: windows that are only measured on.
        validation: windows that a protocol chooses by, if there are any.
        max_lora_rank: highest rank of low-rank factors that it trains, as in a device's settings.

    Raises:
        ConfigError: the rank is below 1.
    """

    name: str
    train: LabelledWindows
    holdout: LabelledWindows
    validation: LabelledWindows | None = None
    max_lora_rank: int = NO_RANK_LIMIT

    def __post_init__(self) -> None:
        if self.max_lora_rank < 1:
            raise ConfigError(f"max_lora_rank of {self.name} must be at least 1, got {self.max_lora_rank}")

    def usable(self) -> bool:
        """Whether each part has windows."""
        return all(part is None or len(part) for part in (self.train, self.validation, self.holdout))


def split_hash(clients: Sequence[SimulatedClient]) -> str:
    """What says that two runs had the same clients with the same windows in the same parts.

    Returns:
        64 hexadecimal digits: SHA-256 of, client by client, name, and for train, validation and holdout the number of
        windows, their numbers (float32, little endian) and their classes (int64, little endian).
    """
    digest = hashlib.sha256()
    for client in clients:
        digest.update(f"{client.name}\n".encode())
        for part in (client.train, client.validation, client.holdout):
            digest.update(f"{0 if part is None else len(part)}\n".encode())
            if part is not None:
                digest.update(np.ascontiguousarray(part.x, "<f4").tobytes())
                digest.update(np.ascontiguousarray(part.y, "<i8").tobytes())
    return digest.hexdigest()


def people(prepared: "Prepared", most: int = 0, *, validated: bool = False) -> tuple[SimulatedClient, ...]:
    """Each subject of a data set as a client, split like a device splits its wearer's recordings.

    Class by class the later 30 % are held out; earlier windows that share a sample with them are dropped. Who has no
    windows in one of the parts is no client.

    Args:
        prepared: the data set.
        most: so many subjects, the first ones by name; 0 for all.
        validated: the 30 % before what is held out are the validation part, cut off in the same way.

    Raises:
        ConfigError: fewer subjects than that.
    """
    subjects = prepared.subjects
    if most > len(subjects):
        raise ConfigError(
            f"{prepared.dataset.name} has {len(subjects)} people, {most} clients were asked for"
        )
    spec, clients = prepared.dataset.spec, list[SimulatedClient]()
    for subject in subjects[: most or None]:
        train, holdout = split_by_time(prepared.recordings_of(subject), spec, _HOLDOUT)
        validation = None
        if validated:
            train, validation = split_again_by_time(train, spec.length, _VALIDATION)
        clients.append(SimulatedClient(subject, train, holdout, validation))
    return tuple(client for client in clients if client.usable())


def with_ranks(clients: Sequence[SimulatedClient], ranks: Sequence[int]) -> tuple[SimulatedClient, ...]:
    """The clients with these highest ranks in turn.

    Raises:
        ConfigError: a rank is below 1.
    """
    return tuple(
        replace(client, max_lora_rank=rank) for client, rank in zip(clients, cycle(ranks), strict=False)
    )


def label_skew(
    x: NDArray[np.float32], y: NDArray[np.int64], clients: int, alpha: float, seed: int
) -> tuple[SimulatedClient, ...]:
    """Clients of almost equal size whose labels are skewed, by the recipe of PersonalizedFL.

    The shuffled windows are cut into N / 2 equal blocks, each shared by two clients: per class by a draw of
    Dirichlet(alpha, alpha), a client's share 0 once it holds half of the block; drawn anew until the smaller one has
    half of its fair share. Class by class, each client then learns from 40 %, is measured on 30 % and chooses by the
    rest. Windows that overlap are torn apart: measured windows share samples with learned ones.

    Args:
        x: (N, C, T) windows.
        y: (N,) classes.
        clients: an even number.
        alpha: above 0; the smaller, the more skewed.
        seed: of shuffling and drawing.

    Raises:
        ConfigError: an odd number of clients, alpha out of range, or too few windows.

    Source: specs/federated.md section 0.7.
    """
    if clients < 2 or clients % 2 or not 0.0 < alpha < float("inf"):
        raise ConfigError(
            f"label skew takes an even number of clients and alpha above 0, got {clients}, {alpha}"
        )
    if len(y) < 10 * clients:
        raise ConfigError(f"{len(y)} windows are too few for {clients} clients; 10 each are needed")
    generator = np.random.Generator(np.random.PCG64(rng_key(seed, 0, _STREAM, 0)))
    bounds = np.linspace(0, len(y), clients // 2 + 1).astype(int)
    order = generator.permutation(len(y))
    made: list[SimulatedClient] = []
    for begin, end in pairwise(bounds):
        for rows in _shared_by_two(order[begin:end], y, alpha, generator):
            train, holdout, validation = (_windows(x, y, part) for part in _parts(rows, y, generator))
            made.append(SimulatedClient(f"client-{len(made):04d}", train, holdout, validation))
    return tuple(made)


def _shared_by_two(
    rows: NDArray[np.int64], y: NDArray[np.int64], alpha: float, generator: np.random.Generator
) -> Sequence[NDArray[np.int64]]:
    for _ in range(_MOST_DRAWS):
        parts: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
        sizes = np.zeros(2)
        for label in np.unique(y[rows]):
            own = rows[y[rows] == label]
            share = generator.dirichlet([alpha, alpha]) * (sizes < len(rows) / 2)
            total = share.sum()
            first = round(len(own) * (share[0] / total if total > 0 else 0.5))
            for client, part in enumerate((own[:first], own[first:])):
                parts[client].append(part)
                sizes[client] += len(part)
        if sizes.min() >= _FEWEST_OF_FAIR_SHARE * len(rows) / 2:
            return [np.concatenate(part) for part in parts]
    raise ConfigError(
        f"no fair division of {len(rows)} windows was drawn at alpha {alpha}; use a larger alpha"
    )


def _parts(
    rows: NDArray[np.int64], y: NDArray[np.int64], generator: np.random.Generator
) -> tuple[NDArray[np.int64], ...]:
    """40 % to learn from, 30 % to measure on and the rest to choose by; of a class with few windows in this order."""
    train, holdout, validation = [], [], []
    for label in np.unique(y[rows]):
        own = generator.permutation(rows[y[rows] == label])
        learned = max(1, round(0.4 * len(own)))
        train.append(own[:learned])
        measured = learned + max(1, round(0.3 * len(own)))
        holdout.append(own[learned:measured])
        validation.append(own[measured:])
    return tuple(np.concatenate(part) for part in (train, holdout, validation))


def _windows(x: NDArray[np.float32], y: NDArray[np.int64], rows: NDArray[np.int64]) -> LabelledWindows:
    nowhere = np.zeros(len(rows), np.int64)
    return LabelledWindows(np.asarray(x[rows]), y[rows], nowhere, nowhere)
