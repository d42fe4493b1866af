"""From the stored updates of a round to new global tensors; runs in a thread."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.engine import Connection
from wearfleet_protos.codecs import Turn
from wearfleet_protos.errors import AggregationError, ShapeError
from wearfleet_protos.tensors import Digest, check_finite, decode_tensors, encode_tensors

from wearfleet_cloud.federated.aggregate import Arrays, Contribution
from wearfleet_cloud.federated.broadcast import fold_broadcast
from wearfleet_cloud.federated.cohort import substitutes
from wearfleet_cloud.federated.fedbuff import rebased
from wearfleet_cloud.federated.robust.evidence import Judgement
from wearfleet_cloud.federated.round import Receipt, Round
from wearfleet_cloud.service.run_context import ActiveRun
from wearfleet_cloud.service.run_setup import TENSORS_MEDIA_TYPE
from wearfleet_cloud.service.updates import UpdateStore
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_cloud.storage.catalog import insert_artifact

__all__ = ["Folded", "Folding"]


@dataclass(frozen=True, slots=True)
class Folded:
    """What a round gave, as it is stored: digest and bytes of the tensors, and of the server's state ("" for none).

    ``judged`` is what a robust rule said of clients, if it is worth a place in the round's record.
    """

    digest: Digest
    size_bytes: int
    state: str
    state_bytes: int
    judged: tuple[Judgement, ...] = ()

    def note(self, connection: Connection) -> None:
        """Enter what was stored into the database."""
        now_ns = time.time_ns()
        insert_artifact(connection, self.digest, self.size_bytes, TENSORS_MEDIA_TYPE, now_ns)
        if self.state:
            insert_artifact(connection, Digest(self.state), self.state_bytes, TENSORS_MEDIA_TYPE, now_ns)


class Folding:
    """Averages updates and stores the result; keeps the newest tensors, which the next round starts from.

    Args:
        blobs: global tensors.
        updates: what devices uploaded.
        on_tensors: called with the bytes of the result.
    """

    def __init__(
        self, blobs: Blobs, updates: UpdateStore, on_tensors: Callable[[Digest, bytes], None]
    ) -> None:
        self._blobs, self._updates, self._on_tensors = blobs, updates, on_tensors
        self._newest: tuple[Digest, Arrays] | None = None

    def contributions(
        self, run: ActiveRun, current: Round, updates: Mapping[str, Digest]
    ) -> tuple[Contribution, ...]:
        """The stored updates of a round, by client's digest; its receipts say how many windows each trained on."""
        return tuple(
            self._contribution(run, receipt, updates[receipt.client]) for receipt in current.receipts
        )

    def fold(self, run: ActiveRun, current: Round, contributions: Sequence[Contribution]) -> Folded:
        """Average the updates of a round.

        Args:
            run: strategy and plan.
            current: the round.
            contributions: its updates.

        Returns:
            The new global tensors and what the strategy keeps for its next round, both stored.

        Raises:
            AggregationError: the average is not finite, or an update does not fit.
            NotFoundError: an update, the global tensors or the server's state are gone.
            IntegrityError: a file was changed.
        """
        averaged = fold_broadcast(
            run.strategy,
            run.plan.tensors,
            self.tensors(run, current.base),
            self._state(current),
            contributions,
            Turn(run.plan.seed, current.number),
        )
        try:
            check_finite(averaged.tensors)
            check_finite(averaged.state)
        except ShapeError as error:
            raise AggregationError(f"the average overflows: {error}") from error
        data = encode_tensors(averaged.tensors)
        kept = encode_tensors(averaged.state) if averaged.state else b""
        digest, state = self._blobs.put(data), self._blobs.put(kept) if kept else ""
        self._newest = digest, averaged.tensors
        self._on_tensors(digest, data)
        judged = tuple(j for j in averaged.mean.evidence if j.noted)
        return Folded(digest, len(data), state, len(kept), judged)

    def tensors(self, run: ActiveRun, base: Digest) -> Arrays:
        """The global tensors with this digest."""
        if self._newest is None or self._newest[0] != base:
            self._newest = base, decode_tensors(self._blobs.read(base), run.plan.download_specs())
        return self._newest[1]

    def cohort(self, run: ActiveRun, planned: Round, eligible: Collection[str]) -> tuple[str, ...] | None:
        """Who takes part in a round, if the strategy decides it; None leaves it to the operator's policy.

        Raises:
            NotFoundError: the server's state is gone.
            IntegrityError: its file was changed.
        """
        if not run.strategy.info.names_cohort:
            return None
        return run.strategy.cohort(sorted(eligible), planned.number, self._state(planned))

    def substitutes(
        self, run: ActiveRun, current: Round, connected: Collection[str], slots: int
    ) -> tuple[str, ...]:
        """Clients for free slots of a running round: as the strategy names them, else a sample.

        Raises:
            NotFoundError: the server's state is gone.
            IntegrityError: its file was changed.
        """
        named = self.cohort(run, current, set(connected) - set(current.invited))
        return substitutes(current, connected, run.settings.seed, slots) if named is None else named[:slots]

    def _state(self, current: Round) -> Arrays:
        return decode_tensors(self._blobs.read(Digest(current.base_state))) if current.base_state else {}

    def _contribution(self, run: ActiveRun, receipt: Receipt, digest: Digest) -> Contribution:
        def load() -> Arrays:
            update = self._updates.load(receipt.client, digest, run.update_format)
            return self._from_current(run, Digest(receipt.base), update) if receipt.staleness else update

        return Contribution(
            receipt.client, receipt.num_examples, load, receipt.num_steps, staleness=receipt.staleness
        )

    def _from_current(self, run: ActiveRun, base: Digest, update: Arrays) -> Arrays:
        """A stale update beside the round's tensors, which are the newest ones while it is folded."""
        assert self._newest is not None
        started = decode_tensors(self._blobs.read(base), run.plan.download_specs())
        return rebased(update, run.plan.tensors, started, self._newest[1])
