"""Secure aggregation of one federated task on the device: its stages as questions to the service.

Keys are shared before training, because then the group is known whose masks cancel; what unmasks the sum is revealed
after the service has the masked update. All secrets live in this object, in memory, for this one round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
from wearfleet_protos.errors import ProtocolError, TransportError, WearfleetError
from wearfleet_protos.secagg.messages import (
    Answer,
    Deliveries,
    NeighbourKeys,
    Notice,
    Survivors,
    UnmaskRequest,
)
from wearfleet_protos.secagg.vectors import flat, size_of
from wearfleet_protos.secagg.words import encode_words

from wearfleet_edge.secagg_client import Member, SecureClient
from wearfleet_edge.transport.backoff import Backoff, with_retries

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from wearfleet_protos.secagg.parameters import SecureParameters
    from wearfleet_protos.tensors import TensorSpec

    from wearfleet_edge.transport.cloud import Cloud, Task

__all__ = ["SecureTask"]

_LOG = logging.getLogger(__name__)

N = TypeVar("N", NeighbourKeys, Deliveries, Survivors, UnmaskRequest)

_WAIT_SECONDS: Final = 20.0
_ATTEMPTS: Final = 5


class SecureTask:
    """One round's secure aggregation.

    Args:
        cloud: the service.
        task: of this round, with its parameters.
        member: this device and its terms.
        specs: ``Plan.upload_specs()``.
        backoff: delays between tries.
        wait: waits the given seconds and tells whether the agent stops.

    Raises:
        ProtocolError: the parameters do not fit the task or the update.
        DeniedError: the cohort is smaller than this device accepts.
    """

    def __init__(
        self,
        cloud: Cloud,
        task: Task,
        member: Member,
        specs: Sequence[TensorSpec],
        *,
        backoff: Backoff,
        wait: Callable[[float], bool],
    ) -> None:
        parameters = _parameters_of(task)
        if parameters.size != size_of(specs):
            raise ProtocolError(
                f"the secure round sums {parameters.size} numbers, an update has {size_of(specs)}"
            )
        self._cloud, self._task, self._specs = cloud, task, tuple(specs)
        self._backoff, self._wait = backoff, wait
        self._client = SecureClient(member, parameters, task.run_id, task.round_number)
        self._deliveries = Deliveries(())

    @property
    def attempt_id(self) -> str:
        """Of the task it belongs to."""
        return self._task.attempt_id

    def close(self) -> None:
        """Drop all secrets."""
        self._client.close()

    def share_keys(self) -> None:
        """Stages 0 and 1, before training.

        Raises:
            WearfleetError: the service said something that this device refuses, or the round goes on without it.
            TransportError: the network failed.
        """
        keys = self._next(self._client.advertise(), NeighbourKeys)
        self._deliveries = self._next(self._client.share_keys(keys), Deliveries)

    def masked(self, update: Mapping[str, NDArray[np.generic]], num_examples: int) -> bytes:
        """Stage 2: the bytes of the masked update.

        Raises:
            ShapeError: the update is not finite, or not that of the plan.
        """
        return encode_words(self._client.mask(self._deliveries, flat(self._specs, update), num_examples))

    def unmask(self) -> None:
        """Stages 3 and 4, after the masked update was accepted. Whatever fails is logged: the others can do without."""
        try:
            survivors = self._next(None, Survivors)
            request = self._next(self._client.confirm(survivors), UnmaskRequest)
            self._ask(self._client.reveal(request))
        except WearfleetError as error:
            _LOG.warning(
                "round %d of %s: nothing more is revealed: %s",
                self._task.round_number,
                self._task.run_id,
                error,
            )
        finally:
            self.close()

    def _next(self, answer: Answer | None, kind: type[N]) -> N:
        """Answer, and ask again until the others have answered too."""
        while (notice := self._ask(answer)) is None:
            if self._wait(0.0):
                raise TransportError("the agent is stopping")
        if not isinstance(notice, kind):
            raise ProtocolError(f"expected {kind.__name__}, the service sent {type(notice).__name__}")
        return notice

    def _ask(self, answer: Answer | None) -> Notice | None:
        return with_retries(
            lambda: self._cloud.exchange(self._task, answer, _WAIT_SECONDS),
            attempts=_ATTEMPTS,
            backoff=self._backoff,
            wait=self._wait,
        )


def _parameters_of(task: Task) -> SecureParameters:
    assert task.secure is not None, "only tasks with parameters are secure ones"
    return task.secure
