"""The present secure round of the coordinator: opened with the invitation, lost with the process."""

import asyncio
import datetime as dt
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from cryptography import x509
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError, ConflictError, WearfleetError
from wearfleet_protos.secagg.identity import CertificateVerifier, Verifier
from wearfleet_protos.secagg.parameters import SecureParameters
from wearfleet_protos.secagg.vectors import size_of
from wearfleet_protos.secagg.words import words_of
from wearfleet_protos.tensors import Digest

from wearfleet_cloud.federated.privacy.secagg_server import SecureSum
from wearfleet_cloud.federated.round import Round, RoundState
from wearfleet_cloud.fleet.identity import Authority
from wearfleet_cloud.service.round_keeper import RoundKeeper
from wearfleet_cloud.service.run_context import ActiveRun
from wearfleet_cloud.service.secure_room import SecureRoom
from wearfleet_cloud.service.updates import UpdateStore

__all__ = ["SecureRounds", "device_verifier"]

_LOGGER: Final = logging.getLogger(__name__)
_RESTARTED: Final = "the service was restarted in the middle; what was exchanged lived in memory only"


def device_verifier(authority: Authority) -> CertificateVerifier:
    """Checks what devices sign, by the certificates that this authority gave them."""
    root = x509.load_pem_x509_certificate(authority.ca_pem)
    return CertificateVerifier(root, lambda: dt.datetime.now(dt.UTC))


class SecureRounds:
    """At most one room.

    Args:
        verifier: of devices' certificates.
        updates: masked inputs.
        leave_out: told about devices that a round goes on without, with the reason.
    """

    def __init__(
        self,
        verifier: Verifier,
        updates: UpdateStore,
        leave_out: Callable[[RoundKeeper, frozenset[str], str], None],
    ) -> None:
        self._verifier, self._updates, self._leave_out = verifier, updates, leave_out
        self._room: SecureRoom | None = None
        self._lost: RoundKeeper | None = None

    def adopted(self, keeper: RoundKeeper) -> None:
        """This round comes from the database: if its devices were invited before, their keys are lost."""
        self._lost = keeper if keeper.round.state in (RoundState.RUNNING, RoundState.AGGREGATING) else None

    def open(self, run: ActiveRun, keeper: RoundKeeper) -> None:
        """Begin with the devices that are invited; leave all of them out where it cannot begin."""
        if not run.secure or keeper.kind != "train" or self._has(keeper.round.run_id, keeper.round.number):
            return
        self.close()
        invited = frozenset(keeper.round.invited)
        if keeper is self._lost:
            self._leave_out(keeper, invited, _RESTARTED)
            return
        try:
            parameters = self._parameters(run, keeper.round)
        except WearfleetError as error:
            _LOGGER.error("round %d of %s: %s", keeper.round.number, run.run_id, error)  # noqa: TRY400 - says it all
            self._leave_out(keeper, invited, str(error)[:200])
            return
        self._room = SecureRoom(
            parameters,
            self._verifier,
            run.strategy.secure.secagg_stage_s,
            lambda devices, reason: self._leave_out(keeper, devices, reason),
        )

    def close(self) -> None:
        """The round is over."""
        if self._room is not None:
            self._room.close()
            self._room = None

    def lose(self, device_id: str) -> None:
        """A device will not answer any more."""
        if self._room is not None:
            self._room.lose(device_id)

    def room_of(self, run_id: str, round_number: int) -> SecureRoom:
        """The room of a round.

        Raises:
            ConflictError: the round is over, or was lost.
        """
        if self._room is None or not self._has(run_id, round_number):
            raise ConflictError(
                f"round {round_number} of {run_id[:64]!r} exchanges no keys; it is over, or was lost"
            )
        return self._room

    def parameters_of(self, keeper: RoundKeeper) -> SecureParameters | None:
        """What devices are told of the present round; None when it is not a secure one."""
        found = self._has(keeper.round.run_id, keeper.round.number)
        return self._room.parameters if self._room is not None and found else None

    def fault_of(self, keeper: RoundKeeper, device_id: str) -> str:
        """Why a masked input cannot be taken; empty when it can."""
        try:
            return self.room_of(keeper.round.run_id, keeper.round.number).fault_of(device_id)
        except ConflictError as error:
            return str(error)

    async def total(self, run: ActiveRun, current: Round, updates: Mapping[str, Digest]) -> SecureSum:
        """The weighted mean of a round's masked inputs.

        Raises:
            AggregationError: keys were lost, too few devices stayed, or the sum is void.
        """
        try:
            room = self.room_of(current.run_id, current.number)
        except ConflictError as error:
            raise AggregationError(f"secure aggregation: {_RESTARTED}") from error
        return await room.total(await asyncio.to_thread(self._inputs, run, updates))

    def _inputs(self, run: ActiveRun, updates: Mapping[str, Digest]) -> dict[str, NDArray[np.uint32]]:
        return {
            device_id: words_of(self._updates.load(device_id, digest, run.update_format))
            for device_id, digest in updates.items()
        }

    def _has(self, run_id: str, round_number: int) -> bool:
        room = self._room
        return room is not None and (room.parameters.run_id, room.parameters.round) == (run_id, round_number)

    def _parameters(self, run: ActiveRun, current: Round) -> SecureParameters:
        return run.strategy.secure.parameters(
            run.run_id,
            current.number,
            current.invited,
            size=size_of(run.plan.upload_specs()),
            uniform=run.strategy.averaging.weighting == "uniform",
            graph_seed=secrets.randbits(62),
        )
