"""Rounds in virtual time: the service's own state machine, told of simulated clients that need time or are lost.

What counts in a round does not depend on what its clients learn, so it is found first, and only what counts is trained.
All that happens at one instant has happened before a cohort or a substitute is chosen.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import digest_of

from wearfleet_cloud.federated.cohort import CohortPolicy, cohort_of, substitutes
from wearfleet_cloud.federated.latency import Latency
from wearfleet_cloud.federated.round import advance, next_round
from wearfleet_cloud.federated.round_events import (
    Aggregated,
    CohortSelected,
    DeadlinePassed,
    Event,
    SlotsGivenAway,
    TaskFetched,
    UpdateSubmitted,
)
from wearfleet_cloud.federated.round_record import Round, RoundPolicy, RoundState

__all__ = ["Counted", "VirtualRound", "VirtualRun"]

_BASE: Final = digest_of(b"")


@dataclass(frozen=True, slots=True)
class Counted:
    """An update that counts: of which client, for the task of which round, how many versions late."""

    client: str
    task: int
    staleness: int


@dataclass(frozen=True, slots=True)
class VirtualRound:
    """A round that ended.

    Args:
        number: from 1.
        published: False when it was skipped.
        counted: in the order of arrival; empty when it was skipped.
        fetched: clients that were given a task, as often as they were.
        lost: how often a client was given up.
        ended_s: virtual time since the start of the run.
    """

    number: int
    published: bool
    counted: tuple[Counted, ...]
    fetched: tuple[str, ...]
    lost: int
    ended_s: float


@dataclass(slots=True)
class VirtualRun:
    """The rounds of a run whose clients are always connected.

    Args:
        examples: training windows of every client.
        cohort: sizes.
        policy: when a round has enough; buffered or synchronous.
        latency: of the clients.
        seed: of the cohorts.
        lease_s: a client that is lost is given up so long after it got its task.

    Raises:
        ConfigError: a buffer would wait for ever, because every client is lost after each of its tasks.
    """

    examples: Mapping[str, int]
    cohort: CohortPolicy
    policy: RoundPolicy
    latency: Latency
    seed: int
    lease_s: float
    _now: float = 0.0
    _lost: int = 0
    _round: Round | None = None
    _coming: list[tuple[float, str, int, bool]] = field(default_factory=list)
    _tasks: dict[str, int] = field(default_factory=dict)
    _working: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        times = [self.latency.recorded.get(client, (0.0,)) for client in self.examples]
        if self.policy.buffered and all(math.isinf(seconds) for own in times for seconds in own):
            raise ConfigError(
                "by the recorded times no client ever answers; give seconds for a task of at least one"
            )

    def play(self, clients: tuple[str, ...] | None = None) -> VirtualRound:
        """The next round.

        Args:
            clients: its cohort, where the strategy decides it.

        Raises:
            ConfigError: there are too few clients for it to begin.
        """
        before, self._lost = self._round, 0
        current = (
            Round("simulation", 1, _BASE, self.policy) if before is None else next_round(before, _attempt)
        )
        event = (
            cohort_of(current, self.examples.keys(), self.cohort, self.seed)
            if clients is None
            else CohortSelected(clients, len(clients))
        )
        if event is None:
            raise ConfigError(f"{len(self.examples)} clients are too few for {self.cohort}")
        current = self._tell(current, event)
        while current.state == RoundState.RUNNING:
            chosen = substitutes(current, self.examples.keys(), self.seed, current.free_slots)
            current = self._tell(current, SlotsGivenAway((), chosen)) if chosen else current
            for client in current.lost[: current.free_slots] if current.policy.buffered else ():
                current = self._tell(current, TaskFetched(client))  # it asks again, and nobody else is there
                self._begin(client, current.number)
            current = self._next_instant(current)
        if current.state == RoundState.AGGREGATING:
            current = self._tell(current, Aggregated(digest_of(b"%d" % current.number)))
        self._round = current
        return _ended(current, self._lost, self._now)

    def _tell(self, current: Round, event: Event) -> Round:
        """The round after an event now; whoever it invites fetches the task at once."""
        current, _ = advance(current, event, self._now)
        busy = {*current.fetched, *(task.client for task in current.carried)}
        for client in current.at_work if current.state == RoundState.RUNNING else ():
            if client not in busy:
                current, _ = advance(current, TaskFetched(client), self._now)
                self._begin(client, current.number)
        return current

    def _begin(self, client: str, number: int) -> None:
        self._tasks[client] = self._tasks.get(client, 0) + 1
        self._working[client] = number
        seconds = self.latency.seconds(client, self._tasks[client])
        lost = math.isinf(seconds)
        heapq.heappush(self._coming, (self._now + (self.lease_s if lost else seconds), client, number, lost))

    def _next_instant(self, current: Round) -> Round:
        """All that happens at the next instant at which something happens, until the round ends."""
        self._now = min([current.deadline, *(at for at, *_ in self._coming[:1])])
        while self._coming and self._coming[0][0] <= self._now and current.state == RoundState.RUNNING:
            _, client, number, lost = heapq.heappop(self._coming)
            if self._working.get(client) == number:
                del self._working[client]
                self._lost += lost
                current = self._tell(
                    current, SlotsGivenAway((client,), ()) if lost else self._sent(client, number)
                )
        if current.state == RoundState.RUNNING and self._now >= current.deadline:
            current = self._tell(current, DeadlinePassed())
        return current

    def _sent(self, client: str, number: int) -> Event:
        attempt = _attempt(number, client)
        return UpdateSubmitted(client, attempt, digest_of(attempt.encode()), self.examples[client])


def _attempt(number: int, client: str) -> str:
    return f"{number} {client}"


def _ended(closed: Round, lost: int, now: float) -> VirtualRound:
    published = closed.state == RoundState.PUBLISHED
    counted = tuple(
        Counted(r.client, int(r.attempt.split()[0]), r.staleness) for r in closed.receipts if published
    )
    return VirtualRound(closed.number, published, counted, closed.fetched, lost, now)
