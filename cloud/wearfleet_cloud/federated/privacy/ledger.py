"""What each client's privacy has cost: entries by (run, round, client), so that nothing counts twice.

The entries of a round follow from the round's own state (:func:`charged`) and are written with it. They are made when
clients are invited, before a plan is handed out. Under central privacy nothing is spent until the noised model is
published: what a round did not use is taken out again when it ends. A client's budget is checked before it is invited.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from wearfleet_cloud.federated.privacy.accounting import Spend, Unit, epsilon_of
from wearfleet_cloud.federated.privacy.options import PrivacyOptions
from wearfleet_cloud.federated.round_record import TERMINAL, Round, RoundState

__all__ = ["Ledger", "charged", "cost_of_round"]

Place = tuple[str, int]
"""Run and round."""


def cost_of_round(options: PrivacyOptions) -> Spend | None:
    """What a round costs a client that takes part, or each of its wearer's windows; None where neither is protected.

    Under record-level privacy steps and sampling are the plan's, so every device has the same cost, whatever it holds.
    """
    if options.dp == "off":
        return None
    record = options.record
    if record is None:
        return Spend(options.noise_multiplier)
    return Spend(options.noise_multiplier, record.sampling_rate, record.steps, "record")


def charged(options: PrivacyOptions, current: Round) -> frozenset[str]:
    """The clients that a round has an entry for.

    Args:
        options: of its run.
        current: the round as stored.
    """
    if options.dp == "off":
        return frozenset()
    if options.dp == "central" and current.state in TERMINAL:
        published = current.state == RoundState.PUBLISHED
        return frozenset(r.client for r in current.receipts) if published else frozenset()
    carried = {task.client for task in current.carried}  # their entry is that of the round that invited them
    return frozenset(current.invited) - carried


@dataclass(frozen=True, slots=True)
class Ledger:
    """All entries, by client.

    Args:
        entries: client -> (run, round) -> what it cost.
    """

    entries: Mapping[str, Mapping[Place, Spend]] = field(default_factory=dict)

    def with_round(self, place: Place, clients: Iterable[str], cost: Spend) -> "Ledger":
        """The ledger in which exactly these clients have an entry for a round; doing it again changes nothing."""
        wanted, had = frozenset(clients), self.clients_of(place)
        entries = dict(self.entries)
        for client in had - wanted:
            entries[client] = {key: value for key, value in entries[client].items() if key != place}
        for client in wanted:
            entries[client] = {**entries.get(client, {}), place: cost}
        return replace(self, entries=entries)

    def clients_of(self, place: Place) -> frozenset[str]:
        """Who has an entry for a round."""
        return frozenset(client for client, own in self.entries.items() if place in own)

    def spent(self, client: str, unit: Unit) -> tuple[Spend, ...]:
        """A client's entries of one unit."""
        return tuple(spend for spend in self.entries.get(client, {}).values() if spend.unit == unit)

    def epsilon(self, client: str, delta: float, unit: Unit, more: Spend | None = None) -> float:
        """Of everything of that unit that a client took part in, and of ``more``.

        Raises:
            ConfigError: the library for accounting is not installed, or ``more`` is of the other unit.
        """
        return _epsilon(_merged([*self.spent(client, unit), *([more] if more is not None else [])]), delta)

    def refusal(self, client: str, options: PrivacyOptions) -> str:
        """Why a client cannot afford another round of a run with these options; empty when it can.

        Raises:
            ConfigError: the library for accounting is not installed.
        """
        cost = cost_of_round(options)
        if cost is None or options.max_epsilon == float("inf"):
            return ""
        after = self.epsilon(client, options.dp_delta, cost.unit, cost)
        if after <= options.max_epsilon:
            return ""
        before = self.epsilon(client, options.dp_delta, cost.unit)
        return (
            f"privacy budget: {cost.unit}-level epsilon {before:.3g} is spent and {after:.3g} would be after another "
            f"round, at most {options.max_epsilon:g} is allowed at delta {options.dp_delta:g}"
        )


def _merged(spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """Equal releases as one entry, in a fixed order."""
    counts: Counter[tuple[float, float, Unit]] = Counter()
    for spend in spends:
        counts[spend.noise_multiplier, spend.sampling_rate, spend.unit] += spend.count
    return tuple(Spend(noise, rate, count, unit) for (noise, rate, unit), count in sorted(counts.items()))


@lru_cache(maxsize=4096)
def _epsilon(spends: tuple[Spend, ...], delta: float) -> float:
    return epsilon_of(spends, delta)
