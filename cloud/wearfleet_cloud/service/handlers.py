"""What each call does, in our own types; ``rpc.py`` translates from and to messages."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from wearfleet_protos.chunks import CHUNK_BYTES, WireChunk
from wearfleet_protos.errors import (
    ConflictError,
    DeniedError,
    IntegrityError,
    ProtocolError,
    TransportError,
)
from wearfleet_protos.tensors import Digest, parse_digest

from wearfleet_cloud.service.chunk_cache import ChunkCache
from wearfleet_cloud.service.directory import Directory
from wearfleet_cloud.service.federation import Federation
from wearfleet_cloud.service.updates import SMALL_BYTES, UpdateStore
from wearfleet_cloud.storage.blobs import Blobs, Upload
from wearfleet_cloud.storage.database import Database
from wearfleet_cloud.storage.device_records import note_reported

__all__ = ["ArtifactState", "Artifacts", "Fleet", "Reported", "check_metrics"]

_LOGGER: Final = logging.getLogger(__name__)
_MOST_METRICS: Final = 256
_HEARTBEAT_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class ArtifactState:
    """How much of an artifact is there."""

    complete: bool
    size_bytes: int
    committed_offset: int


class Artifacts:
    """Downloads of shared artifacts, uploads of private updates.

    Args:
        blobs: shared artifacts.
        chunks: their messages.
        updates: private ones.
        federation: knows who may upload.
    """

    def __init__(
        self, blobs: Blobs, chunks: ChunkCache, updates: UpdateStore, federation: Federation
    ) -> None:
        self._blobs, self._chunks = blobs, chunks
        self._updates, self._federation = updates, federation
        self._running: set[tuple[str, Digest]] = set()

    def stat(self, device_id: str, digest_text: str) -> ArtifactState:
        """What is there of a shared artifact, or of this device's own upload.

        Raises:
            IntegrityError: not a digest.
        """
        digest = parse_digest(digest_text)
        if self._blobs.has(digest):
            return ArtifactState(True, self._blobs.size(digest), 0)
        if self._updates.has(device_id, digest):
            return ArtifactState(True, self._updates.size(device_id, digest), 0)
        return ArtifactState(False, 0, self._updates.committed(device_id, digest))

    def download(self, digest_text: str, offset: int) -> Sequence[bytes] | Iterator[bytes]:
        """Serialised messages from an offset on.

        Raises:
            NotFoundError: no such artifact.
            ProtocolError: the offset is beyond its end.
        """
        messages = self._chunks.messages(parse_digest(digest_text), offset)
        self._federation.count_download(max(0, self._blobs.size(Digest(digest_text)) - offset))
        return messages

    async def upload(
        self, device_id: str, digest_text: str, size_bytes: int, offset: int, chunks: AsyncIterator[WireChunk]
    ) -> ArtifactState:
        """Take chunks in until they end; what came is kept when the connection breaks.

        Raises:
            DeniedError: the device has no open training task, or the upload is too large.
            ConflictError: the offset is not the committed one.
            IntegrityError: a chunk's checksum or the digest of the whole is wrong.
            ProtocolError: a chunk is too large, or more came than announced.
            TransportError: the same upload is under way on another connection, or the disk is full; retryable.
        """
        digest = parse_digest(digest_text)
        if not self._federation.may_upload(device_id):
            raise DeniedError(
                "no open training task: an update is uploaded only while its round waits for it"
            )
        if self._updates.has(device_id, digest):
            return self.stat(device_id, digest)
        self._require_no_other(device_id, digest)
        self._running.add((device_id, digest))
        try:
            upload = self._updates.open(device_id, digest, size_bytes, offset)
            return await self._receive(device_id, digest, upload, chunks)
        except OSError as error:
            _LOGGER.error("update of %s cannot be stored: %s", device_id, error)  # noqa: TRY400 - says it all
            raise TransportError(f"update {digest} cannot be stored: {error.strerror}; try again") from error
        finally:
            self._running.discard((device_id, digest))

    async def take_in(
        self, device_id: str, digest_text: str, size_bytes: int, chunks: AsyncIterator[WireChunk]
    ) -> None:
        """Store an update that comes with its submission; what nobody waits for is read and dropped.

        Raises:
            IntegrityError: a chunk's checksum or the digest of the whole is wrong.
            ProtocolError: the chunks are not those of so many bytes.
            DeniedError: it is too large.
            TransportError: the connection broke (what came is kept), or the same update is under way on another one.
        """
        digest = parse_digest(digest_text)
        if self._federation.may_upload(device_id) and not self._updates.has(device_id, digest):
            self._require_no_other(device_id, digest)
            self._updates.forget_unfinished(device_id, digest)
            await self.upload(device_id, digest_text, size_bytes, 0, chunks)
            return
        self._updates.check_size(size_bytes)
        async for _ in chunks:
            pass

    def _require_no_other(self, device_id: str, digest: Digest) -> None:
        if (device_id, digest) in self._running:
            raise TransportError("this upload is under way on another connection; try again")

    async def _receive(
        self, device_id: str, digest: Digest, upload: Upload, chunks: AsyncIterator[WireChunk]
    ) -> ArtifactState:
        with upload:
            async for chunk in chunks:
                self._federation.alive(device_id)
                _check_chunk(chunk)
                upload.append(chunk.offset, chunk.data)
                if upload.full and not upload.complete:
                    await asyncio.to_thread(upload.store)
            if upload.complete:
                small = upload.offset <= SMALL_BYTES
                try:
                    data = upload.finish() if small else await asyncio.to_thread(upload.finish)
                    self._updates.keep(device_id, digest, upload, data)
                except (ConflictError, FileNotFoundError) as error:  # the next round has begun meanwhile
                    if not self._federation.may_upload(device_id):
                        raise
                    raise TransportError(
                        f"upload of {digest} came between two rounds; send it again"
                    ) from error
                return ArtifactState(True, upload.offset, upload.offset)
            await asyncio.to_thread(upload.store)
        return ArtifactState(False, 0, upload.offset)


@dataclass(frozen=True, slots=True)
class Reported:
    """What a device says it runs."""

    agent_version: str
    manifest_digest: str
    model_version: int
    personalised: bool
    refusal: str


class Fleet:
    """Heartbeats.

    Args:
        database: notes what devices report.
        directory: knows what they should run.
    """

    next_after_s: Final = _HEARTBEAT_S

    def __init__(self, database: Database, directory: Directory) -> None:
        self._database, self._directory = database, directory

    async def heartbeat(self, device_id: str, reported: Reported) -> tuple[str, int, int]:
        """Note a report; digest and bytes of the wanted manifest, and the model's version (empty and 0 for none)."""
        now_ns = time.time_ns()
        await self._database.run(
            lambda connection: note_reported(
                connection,
                device_id,
                now_ns,
                agent_version=reported.agent_version,
                manifest_digest=reported.manifest_digest,
                model_version=reported.model_version,
                personalised=reported.personalised,
                refusal=reported.refusal,
            )
        )
        release = self._directory.release
        if release is None:
            return "", 0, 0
        published, size = release
        return published.manifest_digest, size, published.version


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a submission as they may be stored.

    Raises:
        ProtocolError: too many, a name too long, or a value that is not finite.
    """
    if len(metrics) > _MOST_METRICS or any(len(name) > 128 for name in metrics):
        raise ProtocolError(
            f"at most {_MOST_METRICS} metrics with names of 128 characters, got {len(metrics)}"
        )
    bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    if bad:
        raise ProtocolError(f"metric {bad[0]!r} is not finite")
    return dict(metrics)


def _check_chunk(chunk: WireChunk) -> None:
    if len(chunk.data) > CHUNK_BYTES:
        raise ProtocolError(f"a chunk may have {CHUNK_BYTES} bytes, got {len(chunk.data)}")
    if not chunk.intact:
        raise IntegrityError(f"checksum of the chunk at {chunk.offset} is wrong; send it again")
