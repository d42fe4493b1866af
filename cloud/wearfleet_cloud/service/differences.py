"""What a device is sent instead of whole tensors: their difference to what it says that it holds.

Differences go back to the last versions of a run, which are read from its rounds: nothing is lost in a restart, and a
device that holds none of them gets the whole tensors. A difference is the same for all who hold the same; it is an
artifact until the next round begins.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from wearfleet_protos.codecs import MOST_STEPS, frozen_bytes
from wearfleet_protos.errors import WearfleetError
from wearfleet_protos.tensors import Digest, decode_tensors, digest_of

from wearfleet_cloud.federated.aggregate import Arrays
from wearfleet_cloud.federated.broadcast import difference, frozen_of, step_of
from wearfleet_cloud.federated.round import Round
from wearfleet_cloud.service.run_context import ActiveRun, Difference
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_cloud.storage.database import Database
from wearfleet_cloud.storage.run_records import Version, last_versions

__all__ = ["Differences"]

_LOGGER: Final = logging.getLogger(__name__)
_MOST_HELD: Final = 8


@dataclass(slots=True)
class _Made:
    """What was made in a round, by the tensors it leads to and what is held; None where the whole is less."""

    run_id: str
    base: Digest
    versions: Sequence[Version]
    known: dict[tuple[Digest, str], Difference | None] = field(default_factory=dict)
    stored: set[Digest] = field(default_factory=set)


class Differences:
    """Differences of the present round.

    Args:
        database: knows the rounds.
        blobs: global tensors and states; what is made is put there.
        on_tensors: called with the bytes of what is made.
    """

    def __init__(self, database: Database, blobs: Blobs, on_tensors: Callable[[Digest, bytes], None]) -> None:
        self._database, self._blobs, self._on_tensors = database, blobs, on_tensors
        self._lock = asyncio.Lock()
        self._made: _Made | None = None
        self._frozen: tuple[str, str] = ("", "")

    async def to(
        self, run: ActiveRun, current: Round, wanted: Digest, held: Sequence[str]
    ) -> Difference | None:
        """The way to some tensors of a round from what a device holds; None when it should get them whole.

        Args:
            run: strategy and plan.
            current: the round.
            wanted: what the device starts from.
            held: digests that the device told, the best ones first.
        """
        if not held:
            return None
        if wanted in held:
            return Difference(wanted)
        try:
            async with self._lock:
                made = await self._of_round(run, current)
                return await asyncio.to_thread(self._best, run, made, wanted, tuple(held)[:_MOST_HELD])
        except WearfleetError as error:
            _LOGGER.warning("round %d of %s goes down whole: %s", current.number, run.run_id, error)
            return None

    async def _of_round(self, run: ActiveRun, current: Round) -> _Made:
        """What was made in this round; that of another one is thrown away."""
        made = self._made
        if made is None or (made.run_id, made.base) != (run.run_id, current.base):
            versions: list[Version] = []
            if run.plan.downlink is not None:
                versions = await self._database.run(
                    lambda connection: last_versions(connection, run.run_id, MOST_STEPS)
                )
            for digest in () if made is None else made.stored:
                self._blobs.remove(digest)
            self._made = made = _Made(run.run_id, current.base, versions)
        return made

    def _best(self, run: ActiveRun, made: _Made, wanted: Digest, held: Sequence[str]) -> Difference | None:
        for name in held:
            key = wanted, name
            if key not in made.known:
                data = self._data(run, made, wanted, name)
                made.known[key] = self._put(made, name, data) if data else None
            if made.known[key] is not None:
                return made.known[key]
        return None

    def _data(self, run: ActiveRun, made: _Made, wanted: Digest, held: str) -> bytes:
        """A difference; b"" when there is none, or the whole tensors are less."""
        steps = list(made.versions)
        while steps and steps[0].base != held:
            steps = steps[1:]
        if steps and steps[-1].result == wanted:
            old = self._tensors(run, Digest(held))
            coded = [self._step(version) for version in steps]
        elif held and held == self._frozen_digest(run, made.base):
            old, coded = frozen_of(run.plan.tensors, self._tensors(run, made.base)), []
        else:
            return b""
        form = run.plan.download_format()
        return difference(form, old, self._tensors(run, wanted), coded, self._blobs.size(wanted))

    def _step(self, version: Version) -> bytes:
        return step_of(decode_tensors(self._blobs.read(Digest(version.state)))) if version.state else b""

    def _tensors(self, run: ActiveRun, digest: Digest) -> Arrays:
        return decode_tensors(self._blobs.read(digest), run.plan.download_specs())

    def _frozen_digest(self, run: ActiveRun, base: Digest) -> str:
        """Digest of what never changes in a run; "" when that is too little to be told of."""
        if self._frozen[0] != run.run_id:
            data = frozen_bytes(run.plan.download_specs(), self._tensors(run, base))
            self._frozen = run.run_id, digest_of(data) if data else ""
        return self._frozen[1]

    def _put(self, made: _Made, held: str, data: bytes) -> Difference:
        digest = digest_of(data)
        if not self._blobs.has(digest):
            made.stored.add(self._blobs.put(data, digest=digest))
        self._on_tensors(digest, data)
        return Difference(held, digest, len(data))
