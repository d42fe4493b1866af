"""A secure round in one process: the service's machine and the members' own ones, without a network."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError, ProtocolError
from wearfleet_protos.secagg.identity import Verifier
from wearfleet_protos.secagg.messages import (
    Advertisement,
    Confirmation,
    Deliveries,
    NeighbourKeys,
    Notice,
    Revealed,
    SealedShares,
    Survivors,
    UnmaskRequest,
)
from wearfleet_protos.secagg.parameters import SecureParameters

from wearfleet_cloud.federated.privacy.secagg_server import (
    Event,
    Failed,
    InputMasked,
    SecureRound,
    SecureSum,
    SendNotices,
    Stage,
    StageClosed,
    advance,
    unmask,
)

__all__ = ["MemberMachine", "run_in_process"]


class MemberMachine(Protocol):
    """One member in one round; the command line gives the agent's own."""

    def advertise(self) -> Advertisement:
        """Stage 0."""

    def share_keys(self, keys: NeighbourKeys, /) -> SealedShares:
        """Stage 1."""

    def mask(
        self, deliveries: Deliveries, values: NDArray[np.float64], num_examples: int, /
    ) -> NDArray[np.uint32]:
        """Stage 2."""

    def confirm(self, survivors: Survivors, /) -> Confirmation:
        """Stage 3."""

    def reveal(self, request: UnmaskRequest, /) -> Revealed:
        """Stage 4."""


def run_in_process(
    parameters: SecureParameters,
    verifier: Verifier,
    machines: Mapping[str, MemberMachine],
    updates: Mapping[str, tuple[NDArray[np.float64], int]],
    *,
    leaves: Mapping[str, Stage] | None = None,
) -> SecureSum:
    """All stages of a round.

    Args:
        parameters: of the round.
        verifier: of the members.
        machines: by member.
        updates: (P,) differences and windows, by member.
        leaves: the stage that a member does not answer any more.

    Raises:
        AggregationError: too few members stayed, or the sum is void; the old model must be kept.
    """
    current, notices = SecureRound(parameters, verifier), dict[str, Notice | None]()
    notices = dict.fromkeys(parameters.members)
    gone = {name: list(Stage).index(stage) for name, stage in (leaves or {}).items()}
    while current.stage != Stage.COMPLETE:
        stage, asked = current.stage, notices
        for name in sorted(asked):
            if gone.get(name, len(Stage)) > list(Stage).index(stage):
                answer = _answer(name, machines[name], asked[name], updates.get(name))
                current, notices = _happen(current, answer, notices)
        if current.stage == stage:
            current, notices = _happen(current, StageClosed(stage), notices)
    return unmask(current)


def _happen(
    current: SecureRound, event: Event, notices: dict[str, Notice | None]
) -> tuple[SecureRound, dict[str, Notice | None]]:
    after, effects = advance(current, event)
    for effect in effects:
        if isinstance(effect, Failed):
            raise AggregationError(f"secure aggregation: {effect.reason}")
        if isinstance(effect, SendNotices):
            notices = dict(effect.notices)
    return after, notices


def _answer(
    name: str, machine: MemberMachine, notice: Notice | None, update: tuple[NDArray[np.float64], int] | None
) -> Event:
    match notice:
        case None:
            return machine.advertise()
        case NeighbourKeys():
            return machine.share_keys(notice)
        case Deliveries():
            if update is None:
                raise ProtocolError(f"there is no update of {name}")
            return InputMasked(name, machine.mask(notice, *update))
        case Survivors():
            return machine.confirm(notice)
        case UnmaskRequest():
            return machine.reveal(notice)
