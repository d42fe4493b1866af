"""What a device starts a round from: the tensors of the round, or those that the strategy makes for this device.

A model for one device follows from the round's tensors and the server's state alone. It is made when the device asks,
always the same, so a service that was killed makes it again; it is an artifact like any other until the next round.
(What a killed service had made stays in the folder: it might be an artifact that something else needs.)
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from wearfleet_protos.tensors import Digest, decode_tensors, digest_of, encode_tensors

from wearfleet_cloud.federated.aggregate import Arrays
from wearfleet_cloud.federated.round import Round
from wearfleet_cloud.service.run_context import ActiveRun
from wearfleet_cloud.storage.blobs import Blobs

__all__ = ["Downlinks"]


@dataclass(slots=True)
class _Start:
    """Tensors and state that a round starts from, and what was made of them by device."""

    base: Digest
    base_state: str
    tensors: Arrays
    state: Arrays
    made: dict[str, Digest] = field(default_factory=dict)
    stored: set[Digest] = field(default_factory=set)


class Downlinks:
    """Start tensors by device; one round at a time.

    Args:
        blobs: global tensors, states, and what is made of them.
        on_tensors: called with the bytes of what is made.
    """

    def __init__(self, blobs: Blobs, on_tensors: Callable[[Digest, bytes], None]) -> None:
        self._blobs, self._on_tensors = blobs, on_tensors
        self._start: _Start | None = None
        self._lock = asyncio.Lock()

    async def of(self, run: ActiveRun, current: Round, device_id: str) -> Digest:
        """Digest of what a device starts the round from; the artifact is there.

        Raises:
            NotFoundError: the round's tensors or the server's state are gone.
            IntegrityError: a file was changed.
        """
        if not (current.base_state and run.strategy.info.own_downlinks):
            return current.base
        async with self._lock:
            start = self._start
            if start is not None and (start.base, start.base_state) == (current.base, current.base_state):
                known = start.made.get(device_id)
                if known is not None:
                    return known
            return await asyncio.to_thread(self._make, run, current, device_id)

    def _make(self, run: ActiveRun, current: Round, device_id: str) -> Digest:
        start = self._load(run, current)
        received = run.strategy.received(device_id, start.tensors, start.state)
        if received is start.tensors:
            start.made[device_id] = current.base
            return current.base
        data = encode_tensors(received)
        self._on_tensors(digest := self._put(start, data), data)
        start.made[device_id] = digest
        return digest

    def _load(self, run: ActiveRun, current: Round) -> _Start:
        """The start of this round; what was made for another one is thrown away."""
        start = self._start
        if start is None or (start.base, start.base_state) != (current.base, current.base_state):
            if start is not None:
                for digest in start.stored - {current.base}:
                    self._blobs.remove(digest)
            tensors = decode_tensors(self._blobs.read(current.base), run.plan.download_specs())
            state = decode_tensors(self._blobs.read(Digest(current.base_state)))
            start = self._start = _Start(current.base, current.base_state, tensors, state)
        return start

    def _put(self, start: _Start, data: bytes) -> Digest:
        """Store what may be removed again, unless the same bytes are an artifact already."""
        digest = digest_of(data)
        if not self._blobs.has(digest):
            start.stored.add(self._blobs.put(data, digest=digest))
        return digest
