"""Who takes part in a round: a sample that anyone can draw again from the seed."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from wearfleet_protos.batching import rng_key
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.federated.round_events import CohortSelected
from wearfleet_cloud.federated.round_record import Round, RoundPolicy

__all__ = ["Buffering", "CohortPolicy", "cohort_of", "policies_of", "select_cohort", "substitutes"]

_STREAM = 0xC040
"""Keeps these random numbers apart from those of a plan's phases."""


@dataclass(frozen=True, slots=True)
class CohortPolicy:
    """How many clients a round wants: wait for ``min_connected``, invite more than wanted, average ``cohort_size``.

    How few are enough when the time is over is another matter: ``RoundPolicy.quorum``.

    Args:
        cohort_size: updates wanted; 0 means every connected client.
        min_connected: clients that must be connected before a round starts.
        over_selection: invite so many times ``cohort_size``, because some will not answer; 1 to 2.
        concurrency: clients at work at the same time in a buffered run, instead of ``over_selection``; 0 otherwise.

    Raises:
        ConfigError: a number is out of range.
    """

    cohort_size: int = 0
    min_connected: int = 1
    over_selection: float = 1.0
    concurrency: int = 0

    def __post_init__(self) -> None:
        if self.cohort_size < 0 or self.min_connected < 1:
            raise ConfigError(
                "cohort_size must be at least 0 and min_connected at least 1, "
                f"got {self.cohort_size} and {self.min_connected}"
            )
        if not 1.0 <= self.over_selection <= 2.0:
            raise ConfigError(f"over_selection must be 1 to 2, got {self.over_selection}")

    def wanted(self, invited: int) -> int:
        """Updates after which a round with so many invited clients need not wait longer."""
        return min(invited, self.cohort_size or invited)


@dataclass(frozen=True, slots=True)
class Buffering:
    """How a strategy collects asynchronous updates.

    Args:
        size: updates of a buffer.
        concurrency: clients at work at the same time, at least ``size``.
        max_staleness: versions that the model may have gone on since an update's start.

    Raises:
        ConfigError: a number is out of range.
    """

    size: int
    concurrency: int
    max_staleness: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.concurrency or self.max_staleness < 0:
            raise ConfigError(
                "buffer_size must be at least 1, concurrency at least buffer_size and max_staleness at least 0, "
                f"got {self.size}, {self.concurrency}, {self.max_staleness}"
            )


def policies_of(
    buffering: Buffering | None, cohort: CohortPolicy, policy: RoundPolicy
) -> tuple[CohortPolicy, RoundPolicy]:
    """The operator's policies with what the strategy's buffer says; as they are without one.

    Raises:
        ConfigError: the operator chose a cohort size or over-selection too.
    """
    if buffering is None:
        return cohort, policy
    if cohort.cohort_size not in (0, buffering.size) or cohort.over_selection != 1.0:
        raise ConfigError(
            "an asynchronous strategy has no cohorts: set its buffer_size and concurrency, and leave cohort size and "
            f"over-selection out (got {cohort.cohort_size} and {cohort.over_selection})"
        )
    return (
        replace(cohort, cohort_size=buffering.size, concurrency=buffering.concurrency),
        replace(policy, max_staleness=buffering.max_staleness),
    )


def cohort_of(
    planned: Round, connected: Collection[str], policy: CohortPolicy, seed: int
) -> CohortSelected | None:
    """The clients of a planned round; None while too few are connected and nobody is carried over.

    Args:
        planned: the round; in a buffered run with those that are still at work.
        connected: identities of the clients that can be asked.
        policy: sizes.
        seed: of the run.
    """
    busy = {task.client for task in planned.carried}
    chosen = select_cohort(
        set(connected) - busy, policy, seed=seed, round_number=planned.number, busy=len(busy)
    )
    if not chosen and not busy:
        return None
    wanted = policy.cohort_size if planned.policy.buffered else policy.wanted(len(chosen))
    return CohortSelected(chosen, wanted, policy.concurrency)


def substitutes(current: Round, connected: Collection[str], seed: int, slots: int) -> tuple[str, ...]:
    """Clients for free slots of a running round: a sample of those who were not invited to it.

    Args:
        current: the round.
        connected: identities of the clients that can be asked.
        seed: of the run.
        slots: how many at most.
    """
    others = sorted(set(connected) - set(current.invited))
    return _sample(others, slots, rng_key(seed, current.number, _STREAM, len(current.invited)))


def select_cohort(
    connected: Collection[str], policy: CohortPolicy, *, seed: int, round_number: int, busy: int = 0
) -> tuple[str, ...]:
    """Sample the clients of a round, uniformly and without replacement.

    Args:
        connected: identities of the clients that can be asked; their order does not matter.
        policy: sizes.
        seed: of the run.
        round_number: from 1.
        busy: clients at work that are not among the connected ones; they count as connected and take their places.

    Returns:
        Sorted identities; empty while fewer than ``min_connected`` clients are there, which means wait.
    """
    clients = sorted(set(connected))
    if len(clients) + busy < policy.min_connected:
        return ()
    size = policy.concurrency or math.ceil(policy.cohort_size * policy.over_selection) or len(clients)
    return _sample(clients, size - busy, rng_key(seed, round_number, _STREAM, 0))


def _sample(clients: list[str], size: int, key: int) -> tuple[str, ...]:
    """At most so many of sorted clients, uniformly and without replacement, sorted."""
    generator = np.random.Generator(np.random.PCG64(key))
    chosen = generator.choice(len(clients), size=max(0, min(size, len(clients))), replace=False)
    return tuple(clients[i] for i in sorted(chosen))
