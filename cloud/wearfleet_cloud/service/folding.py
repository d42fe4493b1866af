"""From the stored updates of a round to new global tensors; runs in a thread."""

from collections.abc import Callable, Mapping

from wearfleet_protos.errors import AggregationError, ShapeError
from wearfleet_protos.tensors import Digest, check_finite, decode_tensors, encode_tensors

from wearfleet_cloud.federated.aggregate import Arrays, Contribution
from wearfleet_cloud.federated.round import Receipt, Round
from wearfleet_cloud.service.run_context import ActiveRun
from wearfleet_cloud.service.updates import UpdateStore
from wearfleet_cloud.storage.blobs import Blobs

__all__ = ["Folding"]


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

    def fold(self, run: ActiveRun, current: Round, updates: Mapping[str, Digest]) -> tuple[Digest, int]:
        """Average the updates of a round.

        Args:
            run: strategy and plan.
            current: the round; its receipts say how many windows each client trained on.
            updates: client to the digest of its update.

        Returns:
            Digest and bytes of the new global tensors, which are stored.

        Raises:
            AggregationError: the average is not finite, or an update does not fit.
            NotFoundError: an update or the global tensors are gone.
            IntegrityError: a file was changed.
        """
        averaged = run.strategy.server(
            run.plan.tensors,
            self._tensors(run, current.base),
            [self._contribution(run, receipt, updates[receipt.client]) for receipt in current.receipts],
        )
        try:
            check_finite(averaged.tensors)
        except ShapeError as error:
            raise AggregationError(f"the average overflows: {error}") from error
        data = encode_tensors(averaged.tensors)
        digest = self._blobs.put(data)
        self._newest = digest, averaged.tensors
        self._on_tensors(digest, data)
        return digest, len(data)

    def _tensors(self, run: ActiveRun, base: Digest) -> Arrays:
        if self._newest is None or self._newest[0] != base:
            self._newest = base, decode_tensors(self._blobs.read(base), run.plan.download_specs())
        return self._newest[1]

    def _contribution(self, run: ActiveRun, receipt: Receipt, digest: Digest) -> Contribution:
        load = lambda: self._updates.load(receipt.client, digest, run.upload_specs)  # noqa: E731 - one expression
        return Contribution(receipt.client, receipt.num_examples, load)
