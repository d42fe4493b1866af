"""Secure rounds for tests: members with Ed25519 identities, parameters, and the device's own machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from wearfleet_cloud.federated.privacy.secagg_server import (
    Failed,
    InputMasked,
    SecureRound,
    SendNotices,
    Stage,
    StageClosed,
    advance,
)
from wearfleet_edge.secagg_client import Member, SecureClient
from wearfleet_protos.secagg.identity import KnownKeys, KnownKeySigner
from wearfleet_protos.secagg.parameters import SecureParameters, default_neighbours, default_threshold

if TYPE_CHECKING:
    from numpy.typing import NDArray


def names(count: int) -> tuple[str, ...]:
    return tuple(f"device-{index:02d}" for index in range(count))


def parameters(count: int, size: int, **changes: Any) -> SecureParameters:
    """Parameters with the defaults of a run, but few levels of weight, so that weights are exact."""
    neighbours = changes.pop("neighbours", default_neighbours(count))
    values: dict[str, Any] = {
        "run_id": "run",
        "round": 1,
        "members": names(count),
        "neighbours": neighbours,
        "threshold": default_threshold(neighbours),
        "clip": 0.5,
        "levels": 2**16,
        "weight_levels": 1000,
        "max_examples": 1000,
        "size": size,
        "graph_seed": 5,
    } | changes
    return SecureParameters(**values)


@dataclass(frozen=True)
class Group:
    """Members that know each other."""

    signers: dict[str, KnownKeySigner]

    @classmethod
    def of(cls, members: tuple[str, ...]) -> Group:
        return cls({name: KnownKeySigner(Ed25519PrivateKey.generate()) for name in members})

    @property
    def verifier(self) -> KnownKeys:
        return KnownKeys({name: signer.credential for name, signer in self.signers.items()})

    def member(self, name: str, minimum_cohort: int = 2) -> Member:
        return Member(name, self.signers[name], self.verifier, minimum_cohort)

    def clients(self, chosen: SecureParameters, minimum_cohort: int = 2) -> dict[str, SecureClient]:
        return {
            name: SecureClient(self.member(name, minimum_cohort), chosen, chosen.run_id, chosen.round)
            for name in chosen.members
        }


def updates(members: tuple[str, ...], size: int, seed: int = 0) -> dict[str, tuple[NDArray[np.float64], int]]:
    """Differences, some of them beyond the clip of 0.5, and 1 to 1000 windows."""
    generator = np.random.default_rng(seed)
    return {name: (generator.normal(0.0, 0.2, size), int(generator.integers(1, 1001))) for name in members}


def plain_mean(
    given: dict[str, tuple[NDArray[np.float64], int]], members: tuple[str, ...], chosen: SecureParameters
) -> NDArray[np.float64]:
    """What secure aggregation approximates: the mean of the cut updates by integer weights, in float64."""
    weights = np.array([chosen.weight(given[name][1]) for name in members], np.float64)
    cut = np.stack([np.clip(given[name][0], -chosen.clip, chosen.clip) for name in members])
    return weights @ cut / weights.sum()


SEVEN = names(7)
GROUP = Group.of(SEVEN)
VICTIM = SEVEN[0]


def answer_of(talk: Any, name: str) -> Any:
    """What a member says to its last notice; ``talk`` has ``round``, ``clients``, ``notices`` and ``updates``."""
    client, notice = talk.clients[name], talk.notices[name]
    match talk.round.stage:
        case Stage.ADVERTISE:
            return client.advertise()
        case Stage.SHARE:
            return client.share_keys(notice)
        case Stage.MASK:
            return InputMasked(name, client.mask(notice, *talk.updates[name]))
        case Stage.CONFIRM:
            return client.confirm(notice)
        case _:
            return client.reveal(notice)


class Conversation:
    """A round that is played stage by stage, so that a test can change what is said."""

    def __init__(self, chosen: SecureParameters, group: Group, minimum_cohort: int = 2) -> None:
        self.chosen, self.group = chosen, group
        self.clients: dict[str, SecureClient] = group.clients(chosen, minimum_cohort)
        self.round = SecureRound(chosen, group.verifier)
        self.notices: dict[str, Any] = dict.fromkeys(chosen.members)
        self.updates = updates(chosen.members, chosen.size)
        self.failed = ""

    def happen(self, event: Any) -> None:
        self.round, effects = advance(self.round, event)
        for effect in effects:
            if isinstance(effect, SendNotices):
                self.notices = dict(effect.notices)
            if isinstance(effect, Failed):
                self.failed = effect.reason

    def answer(self, name: str) -> Any:
        return answer_of(self, name)

    def play(self, until: Stage, without: tuple[str, ...] = ()) -> None:
        """Go on until this stage begins."""
        while self.round.stage != until:
            stage = self.round.stage
            for name in sorted(self.notices):
                if name not in without:
                    self.happen(self.answer(name))
            if self.round.stage == stage:
                self.happen(StageClosed(stage))
            assert not self.failed


def at(
    stage: Stage, without: tuple[str, ...] = (), minimum_cohort: int = 2
) -> tuple[Conversation, SecureClient]:
    """A round of seven when a stage begins, and its first member."""
    table = Conversation(parameters(7, 6), GROUP, minimum_cohort)
    table.play(stage, without)
    return table, table.clients[VICTIM]
