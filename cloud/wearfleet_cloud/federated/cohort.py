"""Who takes part in a round: a sample that anyone can draw again from the seed."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.plan import rng_key

__all__ = ["CohortPolicy", "select_cohort"]

_STREAM = 0xC040
"""Keeps these random numbers apart from those of a plan's phases."""


@dataclass(frozen=True, slots=True)
class CohortPolicy:
    """How many clients a round wants.

    Args:
        cohort_size: updates wanted; 0 means every connected client.
        min_connected: clients that must be connected before a round starts.
        over_selection: invite so many times ``cohort_size``, because some will not answer; 1 to 2.

    Raises:
        ConfigError: a number is out of range.
    """

    cohort_size: int = 0
    min_connected: int = 1
    over_selection: float = 1.0

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


def select_cohort(
    connected: Collection[str], policy: CohortPolicy, *, seed: int, round_number: int
) -> tuple[str, ...]:
    """Sample the clients of a round, uniformly and without replacement.

    Args:
        connected: identities of the clients that can be asked; their order does not matter.
        policy: sizes.
        seed: of the run.
        round_number: from 1.

    Returns:
        Sorted identities; empty while fewer than ``min_connected`` clients are there, which means wait.
    """
    clients = sorted(set(connected))
    if len(clients) < policy.min_connected:
        return ()
    size = min(len(clients), math.ceil(policy.cohort_size * policy.over_selection) or len(clients))
    generator = np.random.Generator(np.random.PCG64(rng_key(seed, round_number, _STREAM, 0)))
    chosen = generator.choice(len(clients), size=size, replace=False)
    return tuple(clients[i] for i in sorted(chosen))
