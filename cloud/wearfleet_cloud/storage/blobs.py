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

__all__ = ["Blobs", "Upload"]

_READ_BYTES: Final = 1024 * 1024


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
            return self._path(digest).stat().st_size
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

    Args:
        partial: file that grows.
        target: where the complete artifact goes.
        digest: what the bytes must hash to.
        size_bytes: how many they must be.
    """

    def __init__(self, partial: Path, target: Path, digest: Digest, size_bytes: int) -> None:
        self._partial, self._target = partial, target
        self._digest, self._size = digest, size_bytes
        self._hash = hashlib.sha256()
        self._file = partial.open("ab")
        self.offset = self._file.tell()
        if self.offset:
            with partial.open("rb") as begun:
                while block := begun.read(_READ_BYTES):
                    self._hash.update(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def complete(self) -> bool:
        """True when as many bytes came as were announced."""
        return self.offset == self._size

    def append(self, offset: int, data: bytes) -> None:
        """Add the next bytes.

        Raises:
            ConflictError: they are not the next ones.
            ProtocolError: they are more than announced.
        """
        if offset != self.offset:
            raise ConflictError(f"upload stands at {self.offset} bytes, got a chunk for offset {offset}")
        if offset + len(data) > self._size:
            raise ProtocolError(f"upload of {self._size} bytes got {offset + len(data)}")
        self._file.write(data)
        self._file.flush()
        self._hash.update(data)
        self.offset += len(data)

    def finish(self) -> None:
        """Check the digest and make the bytes an artifact.

        Raises:
            IntegrityError: the bytes do not match the digest; they are thrown away.
            ConflictError: the upload was dropped meanwhile.
        """
        self._file.close()
        found = "sha256:" + self._hash.hexdigest()
        if found != self._digest:
            self._partial.unlink(missing_ok=True)
            raise IntegrityError(
                f"uploaded bytes hash to {found}, announced was {self._digest}; upload again"
            )
        try:
            self._partial.replace(self._target)
        except FileNotFoundError as error:
            raise ConflictError(
                f"upload of {self._digest} was dropped meanwhile; nobody waits for it"
            ) from error
