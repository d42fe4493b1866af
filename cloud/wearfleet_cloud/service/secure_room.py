"""One secure round under way: who is told what, deadlines of its stages, and the sum in the end. In memory only."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError, ConflictError, DeniedError, WearfleetError
from wearfleet_protos.secagg.identity import Verifier
from wearfleet_protos.secagg.messages import (
    Advertisement,
    Answer,
    Confirmation,
    Notice,
    Revealed,
    SealedShares,
)
from wearfleet_protos.secagg.parameters import SecureParameters

from wearfleet_cloud.federated.privacy.secagg_server import (
    FINAL,
    Effect,
    Event,
    Failed,
    InputMasked,
    MemberLost,
    SecureRound,
    SecureSum,
    SendNotices,
    Stage,
    StageClosed,
    advance,
    unmask,
)

__all__ = ["SecureRoom"]

_LOGGER: Final = logging.getLogger(__name__)
_ORDER: Final = tuple(Stage)
_ANSWERED: Final = {
    Advertisement: Stage.ADVERTISE,
    SealedShares: Stage.SHARE,
    Confirmation: Stage.CONFIRM,
    Revealed: Stage.UNMASK,
}
_TIMED: Final = frozenset({Stage.ADVERTISE, Stage.SHARE, Stage.CONFIRM, Stage.UNMASK})
"""The masked input has the deadline of the round itself."""


class SecureRoom:
    """Implements a round's secure aggregation for the service; belongs to its event loop.

    Args:
        parameters: of the round.
        verifier: of devices' certificates.
        stage_s: seconds that a stage waits, but for the masked input.
        on_out: told, before any input is due, about members that are left out, with the reason.
    """

    def __init__(
        self,
        parameters: SecureParameters,
        verifier: Verifier,
        stage_s: float,
        on_out: Callable[[frozenset[str], str], None],
    ) -> None:
        self.parameters = parameters
        self._round = SecureRound(parameters, verifier)
        self._stage_s, self._on_out = stage_s, on_out
        self._notices: dict[Stage, Mapping[str, Notice]] = {}
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._arm()

    def close(self) -> None:
        """Nobody waits any more; what was exchanged is forgotten."""
        if self._timer is not None:
            self._timer.cancel()
        self._closed = True
        self._changed.set()

    def lose(self, device_id: str) -> None:
        """A member will not answer any more."""
        if device_id in self.parameters.members and device_id not in self._round.lost:
            self._happen(MemberLost(device_id))

    def fault_of(self, device_id: str) -> str:
        """Why a member's masked input cannot be taken; empty when it can."""
        if self._round.stage == Stage.MASK and device_id in self._round.shared:
            return ""
        return f"the secure round is at {self._round.stage} and does not take an input of this device"

    async def exchange(self, device_id: str, answer: Answer | None, wait_s: float) -> Notice | None:
        """Take a member's answer, and give what follows it; safe to repeat.

        Args:
            device_id: who answers.
            answer: None asks what follows the masked input.
            wait_s: longest wait for the others.

        Returns:
            None when the others are still awaited, or nothing follows.

        Raises:
            ConflictError: the stage is over without this member, or the round has failed.
            DeniedError: it is not a member, or not asked.
            ProtocolError: the answer is malformed.
            IntegrityError: a signature is wrong.
        """
        if device_id not in self.parameters.members:
            raise DeniedError(f"{device_id} is no member of this secure round")
        stage = Stage.MASK if answer is None else _ANSWERED[type(answer)]
        if answer is not None and not self._has(answer):
            self._happen(answer)
        if stage == Stage.UNMASK:
            return None
        following = _ORDER[_ORDER.index(stage) + 1]
        until = asyncio.get_running_loop().time() + wait_s
        while following not in self._notices and not self._over:
            left = until - asyncio.get_running_loop().time()
            if left <= 0 or not await self._wait(left):
                return None
        notice = self._notices.get(following, {}).get(device_id)
        if notice is None:
            raise ConflictError(
                f"the secure round is over for {device_id}: {self._round.reason or 'it goes on without it'}"
            )
        return notice

    async def total(self, inputs: Mapping[str, NDArray[np.uint32]]) -> SecureSum:
        """The weighted mean of the members whose masked inputs came.

        Raises:
            AggregationError: too few members stayed to unmask it, or the sum is void.
        """
        for device_id in sorted(inputs):
            try:
                self._happen(InputMasked(device_id, inputs[device_id]))
            except WearfleetError as error:
                raise AggregationError(f"secure aggregation: {error}") from error
        self._happen(StageClosed(Stage.MASK))
        while not self._over:
            await self._wait(self._stage_s)
        if self._round.stage != Stage.COMPLETE:
            raise AggregationError(f"secure aggregation: {self._round.reason or 'the round was ended'}")
        return await asyncio.to_thread(unmask, self._round)

    @property
    def _over(self) -> bool:
        return self._closed or self._round.stage in FINAL

    def _has(self, answer: Answer) -> bool:
        """True when this very answer was taken before, its stage may be over."""
        current = self._round
        taken = (current.keys, current.shared, current.confirmed, current.revealed)
        return any(came.get(answer.member) == answer for came in taken)

    async def _wait(self, seconds: float) -> bool:
        """Wait for a change; False when none came."""
        changed = self._changed
        try:
            await asyncio.wait_for(changed.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _happen(self, event: Event) -> None:
        before = self._round
        self._round, effects = advance(before, event)
        for effect in effects:
            self._act(before, effect)
        if self._round.stage != before.stage:
            _LOGGER.info(
                "secure round %d of %s: %s", self.parameters.round, self.parameters.run_id, self._round.stage
            )
            self._arm()
            self._changed.set()
            self._changed = asyncio.Event()

    def _act(self, before: SecureRound, effect: Effect) -> None:
        match effect:
            case SendNotices():
                self._notices[self._round.stage] = effect.notices
                if self._round.stage in (Stage.SHARE, Stage.MASK):
                    asked = before.parameters.members if self._round.stage == Stage.SHARE else before.keys
                    self._tell_out(
                        frozenset(asked) - effect.notices.keys(), "it did not share its keys in time"
                    )
            case Failed():
                if before.stage in (Stage.ADVERTISE, Stage.SHARE):
                    self._tell_out(frozenset(before.parameters.members), effect.reason)
            case _:  # unmasking is started by who waits for the sum
                pass

    def _tell_out(self, members: frozenset[str], reason: str) -> None:
        if members:
            self._on_out(members, f"secure aggregation: {reason}")

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        stage = self._round.stage
        if stage in _TIMED:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._stage_s, lambda: self._happen(StageClosed(stage)))
