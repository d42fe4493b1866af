"""Updates that devices upload: private to their device, checked before they count, thrown away after the round."""

import asyncio
import shutil
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.codecs import UpdateFormat
from wearfleet_protos.errors import ConflictError, DeniedError, IntegrityError, NotFoundError
from wearfleet_protos.tensors import Digest, digest_of

from wearfleet_cloud.storage.blobs import Upload

__all__ = ["SMALL_BYTES", "UpdateStore"]

Tensors = dict[str, NDArray[np.generic]]

SMALL_BYTES: Final = 512 * 1024
"""Work on fewer bytes is done at once; handing it to a thread would take longer."""

_PART: Final = ".part"
_NO_ROUND: Final = "none"
_MOST_UNFINISHED: Final = 2
_MOST_SPARE: Final = 256
_CACHE_BYTES: Final = 512 * 1024 * 1024


class UpdateStore:
    """The uploads of the present round, in one folder: ``<device>.<digest>``, with ``.part`` while unfinished.

    The folder is listed when the round begins; after that memory tells what is in it. The files of the round before are
    written over, which is several times faster than making new ones.

    Args:
        root: the folder of all rounds.
        max_bytes: largest upload.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._round = self._before = root
        self._complete: set[tuple[str, Digest]] = set()
        self._unfinished: dict[str, list[Digest]] = {}
        self._spare: deque[Path] = deque()
        self._arrived: dict[tuple[str, Digest], bytes | memoryview] = {}
        self._cache: dict[tuple[str, Digest], Tensors] = {}
        self._cached_bytes = 0

    def begin(self, tag: str, carried: Collection[str] = ()) -> None:
        """Work on the round with this name from now on; "" means that there is none.

        Args:
            tag: name.
            carried: devices whose uploads, also unfinished ones, move on from the round before.
        """
        if self._round.name != _NO_ROUND:
            self._before = self._round
        self._round = self._root / (tag or _NO_ROUND)
        self._round.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self._before.iterdir() if carried and self._before != self._root else ():
            if path.name.removesuffix(_PART).rpartition(".")[0] in carried:
                path.replace(self._round / path.name)
        self._complete, self._unfinished = set(), {}
        for path in sorted(self._round.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            device_id, _, name = path.name.removesuffix(_PART).rpartition(".")
            digest = Digest(f"sha256:{name}")
            if path.name.endswith(_PART):
                self._unfinished.setdefault(device_id, []).append(digest)
            else:
                self._complete.add((device_id, digest))
        self._spare, self._arrived, self._cache = deque(), {}, {}
        self._cached_bytes = 0

    def sweep(self) -> None:
        """Delete what rounds before the last one left, and note the last one's files; slow, call it in a thread."""
        current, before, spare = self._round, self._before, self._spare
        for folder in self._root.iterdir():
            if folder not in (current, before):
                shutil.rmtree(folder, ignore_errors=True)
        if before not in (current, self._root):
            with suppress(FileNotFoundError):  # swept by another call meanwhile
                spare.extend(islice(before.iterdir(), _MOST_SPARE))

    def has(self, device_id: str, digest: Digest) -> bool:
        """True when this device's upload is complete."""
        return (device_id, digest) in self._complete

    def size(self, device_id: str, digest: Digest) -> int:
        """Bytes of a complete upload.

        Raises:
            NotFoundError: it is not there.
        """
        arrived = self._arrived.get((device_id, digest))
        if arrived is not None:
            return len(arrived)
        try:
            return self._file(device_id, digest).stat().st_size
        except FileNotFoundError as error:
            raise NotFoundError(f"update {digest} was not uploaded; upload it and submit again") from error

    def committed(self, device_id: str, digest: Digest) -> int:
        """Bytes of this device's unfinished upload."""
        if digest not in self._unfinished.get(device_id, ()):
            return 0
        try:
            return self._part(device_id, digest).stat().st_size
        except FileNotFoundError:
            return 0

    def check_size(self, size_bytes: int) -> None:
        """Refuse an update before its bytes come.

        Raises:
            DeniedError: it is empty or too large.
        """
        if not 0 < size_bytes <= self._max_bytes:
            raise DeniedError(f"an update may have 1 to {self._max_bytes} bytes, announced were {size_bytes}")

    def forget_unfinished(self, device_id: str, digest: Digest) -> None:
        """Drop what came of an upload, because it begins anew."""
        if self._forget_name(device_id, digest):
            self._part(device_id, digest).unlink(missing_ok=True)

    def open(self, device_id: str, digest: Digest, size_bytes: int, offset: int) -> Upload:
        """Begin or go on with an upload; the oldest of several unfinished ones is dropped.

        Raises:
            DeniedError: it is empty or too large.
            ConflictError: ``offset`` is not the committed one.
        """
        self.check_size(size_bytes)
        committed = self.committed(device_id, digest)
        if committed > size_bytes:
            self.forget_unfinished(device_id, digest)
            committed = 0
        if offset != committed:
            raise ConflictError(
                f"upload of {digest} stands at {committed} bytes, the sender goes on from {offset}"
            )
        unfinished = self._unfinished.setdefault(device_id, [])
        if digest not in unfinished:
            for old in unfinished[: max(0, len(unfinished) - _MOST_UNFINISHED + 1)]:
                self.forget_unfinished(device_id, old)
            unfinished.append(digest)
        file = self._file(device_id, digest)
        return Upload(file.with_name(file.name + _PART), file, digest, size_bytes, self._take_spare())

    def keep(self, device_id: str, digest: Digest, upload: Upload, data: bytes | memoryview | None) -> None:
        """Note that an upload is complete; its bytes stay in memory until :meth:`check` wants them, if there is room.

        Raises:
            ConflictError: its round is over.
        """
        if upload.target.parent != self._round:
            raise ConflictError(f"upload of {digest} came when its round was over; nobody waits for it")
        self._complete.add((device_id, digest))
        self._forget_name(device_id, digest)
        if data is not None and self._cached_bytes + len(data) <= _CACHE_BYTES:
            self._arrived[device_id, digest] = data
            self._cached_bytes += len(data)

    async def check(self, device_id: str, digest: Digest, update_format: UpdateFormat) -> int:
        """Check an update before it counts; its bytes.

        Raises:
            NotFoundError: it was not uploaded.
            IntegrityError: not an update in this format.
            ShapeError: tensors are missing, unexpected, of another shape or type, or not finite.
        """
        size = self.size(device_id, digest)
        unfolded = max(size, update_format.unfolded_bytes)
        if unfolded <= SMALL_BYTES:
            tensors = self._decode(device_id, digest, update_format)
        else:
            tensors = await asyncio.to_thread(self._decode, device_id, digest, update_format)
        arrived = self._arrived.pop((device_id, digest), None)
        self._cached_bytes -= 0 if arrived is None else len(arrived)
        if self._cached_bytes + unfolded <= _CACHE_BYTES:
            self._cache[device_id, digest] = tensors
            self._cached_bytes += unfolded
        return size

    def load(self, device_id: str, digest: Digest, update_format: UpdateFormat) -> Tensors:
        """The tensors of an update; from memory when there was room for them.

        Raises:
            NotFoundError: the file is gone.
            IntegrityError: the file was changed.
            ShapeError: it does not fit.
        """
        cached = self._cache.get((device_id, digest))
        if cached is not None:
            return cached
        if not self.has(device_id, digest):
            raise NotFoundError(f"update {digest} of {device_id} is gone")
        data = self._file(device_id, digest).read_bytes()
        if digest_of(data) != digest:
            raise IntegrityError(f"update {digest} of {device_id} was changed on disk")
        return update_format.decode(data)

    def _decode(self, device_id: str, digest: Digest, update_format: UpdateFormat) -> Tensors:
        """Decode and check bytes whose digest was checked as they came."""
        data = self._arrived.get((device_id, digest)) or self._file(device_id, digest).read_bytes()
        return update_format.decode(data)

    def _forget_name(self, device_id: str, digest: Digest) -> bool:
        names = self._unfinished.get(device_id, [])
        known = digest in names
        if known:
            names.remove(digest)
        return known

    def _take_spare(self) -> Path | None:
        try:
            return self._spare.popleft()
        except IndexError:
            return None

    def _file(self, device_id: str, digest: Digest) -> Path:
        return self._round / f"{device_id}.{digest.removeprefix('sha256:')}"

    def _part(self, device_id: str, digest: Digest) -> Path:
        file = self._file(device_id, digest)
        return file.with_name(file.name + _PART)
