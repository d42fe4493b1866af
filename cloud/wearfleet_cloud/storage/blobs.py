"""Content-addressed bytes in a folder: written once, checked by their SHA-256, read through memory maps.

An unfinished upload is an ordinary file whose length is the committed offset; it survives a restart. A file becomes
an artifact by a rename, after its digest was checked, so a reader never sees half of one.
"""

import hashlib
import mmap
import os
import secrets
from pathlib import Path
from typing import Final, Self

from wearfleet_protos.errors import ConflictError, IntegrityError, NotFoundError, ProtocolError
from wearfleet_protos.tensors import Digest, digest_of, parse_digest

__all__ = ["Blobs", "Upload", "write_over"]

_READ_BYTES: Final = 1024 * 1024
_MOST_SIZES: Final = 10_000
_MOST_WAITING_BYTES: Final = 8 * 1024 * 1024


class Blobs:
    """A folder of artifacts.

    Args:
        root: the folder; created when it is missing, for the service's user only.
    """

    def __init__(self, root: Path) -> None:
        self._complete = root / "complete"
        self._partial = root / "partial"
        for folder in (self._complete, self._partial):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sizes: dict[Digest, int] = {}

    def put(self, data: bytes | memoryview, *, digest: Digest | None = None) -> Digest:
        """Store bytes; when this returns they survive a power cut.

        Args:
            data: the bytes.
            digest: their content address when the caller has just computed it.
        """
        name = digest or digest_of(data)
        target = self._path(name)
        if not target.exists():
            temporary = self._partial / f"put-{secrets.token_hex(8)}"
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._publish(temporary, target)
        return name

    def has(self, digest: Digest) -> bool:
        """True when all bytes are there."""
        return self._path(digest).exists()

    def size(self, digest: Digest) -> int:
        """Bytes of an artifact.

        Raises:
            NotFoundError: it is not there.
        """
        try:
            if digest not in self._sizes:  # a complete artifact never changes
                if len(self._sizes) >= _MOST_SIZES:
                    self._sizes.clear()
                self._sizes[digest] = self._path(digest).stat().st_size
            return self._sizes[digest]
        except FileNotFoundError as error:
            raise NotFoundError(f"no artifact {digest}") from error

    def map(self, digest: Digest) -> memoryview:
        """The bytes as a read-only memory map that lives as long as the view.

        Raises:
            NotFoundError: it is not there.
        """
        try:
            with self._path(digest).open("rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    return memoryview(b"")
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError as error:
            raise NotFoundError(f"no artifact {digest}") from error

    def read(self, digest: Digest) -> bytes:
        """The bytes, checked against their address.

        Raises:
            NotFoundError: it is not there.
            IntegrityError: the file was changed on disk.
        """
        with self.map(digest) as view:
            if digest_of(view) != digest:
                raise IntegrityError(f"artifact {digest} was changed on disk; restore it from a backup")
            return bytes(view)

    def remove(self, digest: Digest) -> None:
        """Forget an artifact; nothing happens when it is not there."""
        self._sizes.pop(digest, None)
        self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: Digest) -> Path:
        hexadecimal = parse_digest(digest).removeprefix("sha256:")
        return self._complete / hexadecimal[:2] / hexadecimal[2:]

    @staticmethod
    def _publish(temporary: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True, mode=0o700)
        temporary.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Upload:
    """An upload under way; a context manager. One writer at a time.

    What comes waits in memory and is written at once when it is complete, when the connection breaks (so that it can go
    on from there), or when :attr:`full` says so.

    Args:
        partial: file with what came on earlier connections.
        target: where the complete artifact goes.
        digest: what the bytes must hash to.
        size_bytes: how many they must be.
        spare: a file that nobody needs any more; its place on the disk is used again, which is several times faster.
    """

    def __init__(
        self, partial: Path, target: Path, digest: Digest, size_bytes: int, spare: Path | None = None
    ) -> None:
        self.target = target
        self._partial, self._spare = partial, spare
        self._digest, self._size = digest, size_bytes
        self._hash = hashlib.sha256()
        self._waiting: list[bytes | memoryview] = []
        self._waiting_bytes = self._stored = 0
        if partial.exists():
            with partial.open("rb") as begun:
                while block := begun.read(_READ_BYTES):
                    self._hash.update(block)
                    self._stored += len(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.store()

    @property
    def offset(self) -> int:
        """Bytes that came so far."""
        return self._stored + self._waiting_bytes

    @property
    def complete(self) -> bool:
        """True when as many bytes came as were announced."""
        return self.offset == self._size

    @property
    def full(self) -> bool:
        """True when so much waits in memory that :meth:`store` should be called."""
        return self._waiting_bytes >= _MOST_WAITING_BYTES

    def append(self, offset: int, data: bytes | memoryview) -> None:
        """Add the next bytes.

        Raises:
            ConflictError: they are not the next ones.
            ProtocolError: they are more than announced.
        """
        if offset != self.offset:
            raise ConflictError(f"upload stands at {self.offset} bytes, got a chunk for offset {offset}")
        if offset + len(data) > self._size:
            raise ProtocolError(f"upload of {self._size} bytes got {offset + len(data)}")
        self._waiting.append(data)
        self._waiting_bytes += len(data)

    def store(self) -> None:
        """Hash what waits, and write it behind what is stored; slow."""
        if self._waiting:
            waiting = self._take_waiting()
            with self._partial.open("ab") as file:
                file.writelines(waiting)

    def finish(self) -> bytes | memoryview | None:
        """Check the digest and make the bytes an artifact; slow.

        Returns:
            The bytes, when they came on one connection and are still in memory.

        Raises:
            IntegrityError: the bytes do not match the digest; they are thrown away.
            ConflictError: the upload was dropped meanwhile.
        """
        if self._stored:
            self.store()
            self._check()
            try:
                self._partial.replace(self.target)
            except FileNotFoundError as error:
                raise ConflictError(
                    f"upload of {self._digest} was dropped meanwhile; nobody waits for it"
                ) from error
            return None
        waiting = self._take_waiting()
        self._check()
        data = waiting[0] if len(waiting) == 1 else b"".join(waiting)
        write_over(self._spare, self._partial, data).replace(self.target)
        return data

    def _take_waiting(self) -> list[bytes | memoryview]:
        waiting, self._waiting = self._waiting, []
        for part in waiting:
            self._hash.update(part)
        self._stored += self._waiting_bytes
        self._waiting_bytes = 0
        return waiting

    def _check(self) -> None:
        found = "sha256:" + self._hash.hexdigest()
        if found != self._digest:
            self._partial.unlink(missing_ok=True)
            raise IntegrityError(
                f"uploaded bytes hash to {found}, announced was {self._digest}; upload again"
            )


def write_over(spare: Path | None, fresh: Path, data: bytes | memoryview) -> Path:
    """Write bytes into a spare file, or into a fresh one when that is gone; says into which."""
    if spare is not None:
        try:
            with spare.open("r+b") as file:
                file.write(data)
                file.truncate()
        except FileNotFoundError:
            pass
        else:
            return spare
    fresh.write_bytes(data)
    return fresh
