"""Artifacts as ready-made download messages: serialised once, sent to every device from the same memory."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from wearfleet_protos.chunks import CHUNK_BYTES, RECEIVED_CHUNK, chunk_message
from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.tensors import Digest

from wearfleet_cloud.storage.blobs import Blobs

__all__ = ["ChunkCache"]

_CACHE_BYTES: Final = 256 * 1024 * 1024
_LARGEST_CACHED: Final = 64 * 1024 * 1024


class ChunkCache:
    """The messages of ``DownloadArtifact``.

    Args:
        blobs: where the bytes are.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._ready: OrderedDict[Digest, tuple[bytes, ...]] = OrderedDict()
        self._bytes = 0

    def add(self, digest: Digest, data: bytes | memoryview) -> None:
        """Serialise an artifact that will soon be asked for; safe to call from a thread."""
        if len(data) > _LARGEST_CACHED or digest in self._ready:
            return
        self._ready[digest] = tuple(_messages(data, 0))
        self._bytes += len(data)
        while self._bytes > _CACHE_BYTES:
            _, dropped = self._ready.popitem(last=False)
            self._bytes -= sum(map(len, dropped))

    def messages(self, digest: Digest, offset: int) -> Sequence[bytes] | Iterator[bytes]:
        """Serialised messages from an offset to the end; reads the file when they are not ready.

        Raises:
            NotFoundError: no such artifact.
            ProtocolError: the offset is beyond its end.
        """
        ready = self._ready.get(digest)
        if ready is not None and offset == 0:
            return ready
        view = self._blobs.map(digest)
        if not 0 <= offset <= len(view):
            raise ProtocolError(f"artifact {digest} has {len(view)} bytes, asked for those from {offset}")
        if offset == 0:
            self.add(digest, view)
        return (self._ready.get(digest) if offset == 0 else None) or _messages(view, offset)


def _messages(data: bytes | memoryview, offset: int) -> Iterator[bytes]:
    for begin in range(offset, len(data), CHUNK_BYTES):
        yield chunk_message(RECEIVED_CHUNK, begin, memoryview(data)[begin : begin + CHUNK_BYTES])
