"""Artifacts on the device: downloaded once, resumed after a break, and trusted only after their digest was checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from wearfleet_protos.errors import IntegrityError
from wearfleet_protos.tensors import Digest, digest_of, parse_digest

from wearfleet_edge.state import sync_directory
from wearfleet_edge.transport.backoff import Backoff, with_retries

if TYPE_CHECKING:
    from pathlib import Path

    from wearfleet_edge.transport.cloud import Bytes, Cloud

__all__ = ["ArtifactStore"]

_ATTEMPTS = 5
_BLOCK = 1 << 18


class ArtifactStore:
    """Files named by their digest.

    Args:
        folder: where they lie.
        cloud: where they come from.
        backoff: delays between tries.
        wait: waits the given seconds and tells whether to give up.
    """

    def __init__(self, folder: Path, cloud: Cloud, backoff: Backoff, wait: Callable[[float], bool]) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._cloud = cloud
        self._backoff = backoff
        self._wait = wait
        self._begun: tuple[Digest, list[Bytes]] | None = None
        self.bytes_received = 0

    def fetch(self, digest: str, max_bytes: int) -> bytes:
        """The bytes of an artifact, from here or from the cloud.

        Args:
            digest: content address.
            max_bytes: refuse anything larger.

        Raises:
            IntegrityError: too large, or the bytes do not match the digest; what came is deleted.
            TransportError: the network failed; what came is kept for the next try.
        """
        name = parse_digest(digest)
        path = self._path(name)
        if not path.exists():
            self._download(name, path, max_bytes)
        data = path.read_bytes()
        if len(data) > max_bytes:
            raise IntegrityError(f"artifact {digest} has {len(data)} bytes, at most {max_bytes} are accepted")
        return data

    def fetch_once(self, digest: str, max_bytes: int, arrived: bytes | bytearray = b"") -> Bytes:
        """The bytes of an artifact that is needed once: they never touch the disk.

        Args:
            digest: content address.
            max_bytes: refuse anything larger.
            arrived: the bytes, when they came another way; checked like a download.

        Raises:
            IntegrityError: too large, or the bytes do not match the digest.
            TransportError: the network failed; what came is kept in memory for the next try.
        """
        name = parse_digest(digest)
        data = arrived or self._receive(name, max_bytes)
        self.bytes_received += len(data)
        if len(data) > max_bytes:
            raise IntegrityError(f"artifact {digest} has {len(data)} bytes, at most {max_bytes} are accepted")
        if (found := digest_of(data)) != name:
            raise IntegrityError(f"the download of {digest} gave {found}; it was damaged or tampered with")
        return data

    def has(self, digest: str) -> bool:
        """True when the artifact is here already."""
        return self._path(parse_digest(digest)).exists()

    def keep_only(self, digests: Iterable[str]) -> None:
        """Delete every other artifact."""
        kept = {self._path(parse_digest(digest)).name for digest in digests}
        for path in self._folder.iterdir():
            if path.name not in kept:
                path.unlink()

    def _download(self, digest: Digest, path: Path, max_bytes: int) -> None:
        partial = path.with_name(path.name + ".part")
        before = partial.stat().st_size if partial.exists() else 0
        try:
            self._retry(lambda: self._cloud.download(digest, partial, max_bytes))
        except IntegrityError:
            partial.unlink()
            raise
        self.bytes_received += partial.stat().st_size - before
        found = _digest_of_file(partial)
        if found != digest:
            partial.unlink()
            raise IntegrityError(f"the download of {digest} gave {found}; it was damaged or tampered with")
        partial.replace(path)
        sync_directory(self._folder)

    def _receive(self, digest: Digest, max_bytes: int) -> Bytes:
        if self._begun is None or self._begun[0] != digest:
            self._begun = digest, []
        parts = self._begun[1]
        try:
            self._retry(lambda: self._cloud.receive(digest, parts, max_bytes))
        except IntegrityError:
            self._begun = None
            raise
        self._begun = None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _retry(self, call: Callable[[], None]) -> None:
        with_retries(call, attempts=_ATTEMPTS, backoff=self._backoff, wait=self._wait)

    def _path(self, digest: Digest) -> Path:
        return self._folder / digest.removeprefix("sha256:")


def _digest_of_file(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
    return "sha256:" + hasher.hexdigest()
