"""The parameters of one secure round, the law that keeps its sum from wrapping, and who is whose neighbour."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from wearfleet_protos.canonical import canonical_json
from wearfleet_protos.errors import ConfigError, ProtocolError

__all__ = [
    "MODULUS",
    "SecureParameters",
    "check_overflow",
    "default_neighbours",
    "default_threshold",
    "largest_weight_levels",
]

MODULUS: Final = 2**32
"""Sums are taken modulo this: a coordinate is one word of 32 bits."""

_MOST_MEMBERS: Final = 10_000
_MOST_WORDS: Final = 2**27


def check_overflow(members: int, weight_levels: int, levels: int) -> None:
    """The overflow law: m W q < R, so that no sum of weighted, quantised values wraps.

    Raises:
        ConfigError: it can wrap; says what fits.
    """
    largest = members * weight_levels * levels
    if largest >= MODULUS:
        raise ConfigError(
            f"{members} members x {weight_levels} weight levels x {levels} levels is {largest}, "
            f"sums must stay below {MODULUS}: take at most {largest_weight_levels(members, levels)} weight levels, "
            "fewer levels or a smaller cohort"
        )


def largest_weight_levels(members: int, levels: int) -> int:
    """The most weight levels that the overflow law allows; 0 when not even one fits."""
    return (MODULUS - 1) // (members * levels)


def default_neighbours(members: int) -> int:
    """About 3 log2(m), even; everybody where that is nearly everybody anyway."""
    wanted = math.ceil(3 * math.log2(max(members, 2)))
    wanted += wanted % 2
    return min(wanted, members - 1)


def default_threshold(neighbours: int) -> int:
    """Two thirds of the neighbours, rounded up; always more than half."""
    return -(-2 * neighbours // 3)


@dataclass(frozen=True, slots=True)
class SecureParameters:
    """What the service proposes for a round; every member checks it and binds all it does to it.

    Args:
        run_id: the federated run.
        round: its round.
        members: the cohort by name, sorted.
        neighbours: k, shares of each secret: an even number, or m - 1 for everybody.
        threshold: t in (k / 2, k]: shares that rebuild a secret.
        clip: c, differences are cut to [-c, c].
        levels: q, steps of a value's range.
        weight_levels: largest integer weight; 1 makes all members weigh the same.
        max_examples: windows from which on a member has the largest weight.
        size: P, numbers of an update.
        graph_seed: of the graph of neighbours.

    Raises:
        ProtocolError: a value is out of range, or sums could wrap.
    """

    run_id: str
    round: int
    members: tuple[str, ...]
    neighbours: int
    threshold: int
    clip: float
    levels: int
    weight_levels: int
    max_examples: int
    size: int
    graph_seed: int

    def __post_init__(self) -> None:
        m, k = len(self.members), self.neighbours
        if not 2 <= m <= _MOST_MEMBERS or self.members != tuple(sorted(set(self.members))):
            raise ProtocolError(f"members must be 2 to {_MOST_MEMBERS} different names in order, got {m}")
        if any("\n" in member for member in self.members):
            raise ProtocolError("a member's name holds a line break")
        if not 1 <= k <= m - 1 or (k % 2 and k != m - 1):
            raise ProtocolError(f"neighbours must be even and below {m}, or {m - 1}, got {k}")
        if not k < 2 * self.threshold <= 2 * k:
            raise ProtocolError(f"threshold must be above {k / 2:g} and at most {k}, got {self.threshold}")
        if not 0.0 < self.clip < math.inf or self.levels < 1 or self.weight_levels < 1:
            raise ProtocolError("clip, levels and weight_levels must be positive")
        if self.max_examples < self.weight_levels or not 1 <= self.size <= _MOST_WORDS:
            raise ProtocolError("max_examples must be at least weight_levels, size 1 to 2^27")
        if self.round < 1 or not 0 <= self.graph_seed < 2**63:
            raise ProtocolError("round must be at least 1 and graph_seed a non-negative 63-bit integer")
        try:
            check_overflow(m, self.weight_levels, self.levels)
        except ConfigError as error:
            raise ProtocolError(str(error)) from error

    def binding(self) -> bytes:
        """(32 bytes) the hash of all parameters, the cohort among them: part of every key and every signature."""
        return hashlib.sha256(b"wearfleet-secagg-v1\n" + canonical_json(asdict(self))).digest()

    def index(self, member: str) -> int:
        """A member's place, from 1: where the polynomials of shares are evaluated for it.

        Raises:
            ProtocolError: not a member.
        """
        try:
            return self.members.index(member) + 1
        except ValueError:
            raise ProtocolError(f"{member[:80]!r} is no member of this round") from None

    def neighbours_of(self, member: str) -> frozenset[str]:
        """Who holds shares of a member's secrets, and masks with it; never itself, and always mutual.

        A ring in random order, each with the k / 2 nearest on both sides (a Harary graph, as in the paper).
        """
        place = self.index(member) - 1
        m, k = len(self.members), self.neighbours
        if k == m - 1:
            return frozenset(self.members) - {member}
        order, places = _ring(self.graph_seed, m)
        reach = [*range(1, k // 2 + 1), *range(-(k // 2), 0)]
        return frozenset(self.members[order[(places[place] + step) % m]] for step in reach)

    def weight(self, num_examples: int) -> int:
        """A member's integer weight: its windows as a share of ``max_examples``, at least 1."""
        share = min(num_examples, self.max_examples) * self.weight_levels / self.max_examples
        return max(1, round(share))


@lru_cache(maxsize=8)
def _ring(seed: int, members: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Who is at each place of the ring, and where each member is."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(members)
    return tuple(order.tolist()), tuple(np.argsort(order).tolist())
