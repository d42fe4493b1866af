"""How long simulated clients take for a task, and which of them are lost: recorded, or drawn from a seed."""

import csv
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from wearfleet_protos.batching import rng_key
from wearfleet_protos.errors import ConfigError

__all__ = ["Latency", "read_recorded"]

_STREAM: Final = 0x1A7E


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds from a task to its update, of every client and task.

    Drawn: median e^(between z_client) e^(within z_task), z standard normal: some are always slow, and each one varies.

    Args:
        median_s: of drawn times, above 0.
        between: standard deviation of the logarithm between clients.
        within: standard deviation of the logarithm between the tasks of a client.
        dropout: share of tasks after which a client is not heard of again until it has been given up.
        seed: of drawn times and losses.
        recorded: times of a client's tasks, used in turn and again; infinity for a task that was lost. They replace
            drawn ones for the clients that they name.

    Raises:
        ConfigError: a number is out of range.
    """

    median_s: float = 1.0
    between: float = 0.0
    within: float = 0.0
    dropout: float = 0.0
    seed: int = 0
    recorded: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 < self.median_s < math.inf or not 0.0 <= max(self.between, self.within) <= 10.0:
            raise ConfigError(
                "latency needs a median above 0 and deviations of at most 10, "
                f"got {self.median_s}, {self.between}, {self.within}"
            )
        if min(self.between, self.within) < 0.0 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be at least 0 and below 1, deviations not negative; got {self}")

    def seconds(self, client: str, task: int) -> float:
        """Time of a client's task with this number (from 1); infinity when the client is lost."""
        recorded = self.recorded.get(client)
        if recorded:
            return recorded[(task - 1) % len(recorded)]
        who = int.from_bytes(hashlib.sha256(client.encode()).digest()[:6])
        own = _draw(self.seed, who, 0).standard_normal()
        draw = _draw(self.seed, who, task)
        varied, lost = draw.standard_normal(), draw.uniform() < self.dropout
        return math.inf if lost else self.median_s * math.exp(self.between * own + self.within * varied)


def read_recorded(file: Path) -> dict[str, tuple[float, ...]]:
    """Recorded times: CSV with the columns client and seconds, one row a task; no seconds for a task that was lost.

    Raises:
        ConfigError: not such a file.
    """
    times: dict[str, list[float]] = {}
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                times.setdefault(row["client"], []).append(float(row["seconds"] or math.inf))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} is no CSV file with columns client and seconds: {error!r}") from error
    if not all(seconds > 0.0 for rows in times.values() for seconds in rows):
        raise ConfigError(f"{file}: seconds must be above 0, or empty for a task that was lost")
    return {client: tuple(rows) for client, rows in times.items()}


def _draw(seed: int, who: int, task: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([rng_key(seed, task, _STREAM, 0), who]))
