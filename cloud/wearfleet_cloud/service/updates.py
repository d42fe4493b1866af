"""Updates that devices upload: private to their device, checked before they count, thrown away after the round."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import DeniedError, NotFoundError
from wearfleet_protos.tensors import Digest, TensorSpec, check_finite, decode_tensors

from wearfleet_cloud.storage.blobs import Blobs, Upload

__all__ = ["UpdateStore"]

Tensors = dict[str, NDArray[np.generic]]

_MOST_UNFINISHED: Final = 2
_CACHE_BYTES: Final = 512 * 1024 * 1024


class UpdateStore:
    """The uploads of the present round, one blob folder a device.

    Args:
        root: the folder of all of them.
        max_bytes: largest upload.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._round = root
        self._cache: dict[tuple[str, Digest], Tensors] = {}
        self._cached_bytes = 0

    def begin(self, tag: str) -> None:
        """Work on the round with this name from now on; "" means that there is none."""
        self._round = self._root / (tag or "none")
        self._cache.clear()
        self._cached_bytes = 0

    def sweep(self) -> None:
        """Delete the uploads of every other round; slow, call it in a thread."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in self._root.iterdir():
            if folder != self._round:
                shutil.rmtree(folder, ignore_errors=True)

    def has(self, device_id: str, digest: Digest) -> bool:
        """True when this device's upload is complete."""
        return self._blobs(device_id).has(digest)

    def size(self, device_id: str, digest: Digest) -> int:
        """Bytes of a complete upload.

        Raises:
            NotFoundError: it is not there.
        """
        return self._blobs(device_id).size(digest)

    def committed(self, device_id: str, digest: Digest) -> int:
        """Bytes of this device's unfinished upload."""
        return self._blobs(device_id).committed(digest)

    def open(self, device_id: str, digest: Digest, size_bytes: int, offset: int) -> Upload:
        """Begin or go on with an upload; the oldest of several unfinished ones is dropped.

        Raises:
            DeniedError: it is empty or too large.
            ConflictError: ``offset`` is not the committed one.
        """
        if not 0 < size_bytes <= self._max_bytes:
            raise DeniedError(f"an update may have 1 to {self._max_bytes} bytes, announced were {size_bytes}")
        blobs = self._blobs(device_id)
        others = [other for other in blobs.unfinished() if other != digest]
        for old in others[: max(0, len(others) - _MOST_UNFINISHED + 1)]:
            blobs.drop_upload(old)
        return blobs.open_upload(digest, size_bytes, offset)

    def check(self, device_id: str, digest: Digest, specs: Sequence[TensorSpec]) -> None:
        """Check an update before it counts; slow, call it in a thread.

        Raises:
            NotFoundError: it was not uploaded.
            IntegrityError: not safetensors.
            ShapeError: tensors are missing, unexpected, of another shape or type, or not finite.
        """
        tensors = decode_tensors(
            bytes(self._complete(device_id, digest).map(digest)), specs
        )  # hashed as it came
        check_finite(tensors)
        size = sum(array.nbytes for array in tensors.values())
        if self._cached_bytes + size <= _CACHE_BYTES:
            self._cache[device_id, digest] = tensors
            self._cached_bytes += size

    def load(self, device_id: str, digest: Digest, specs: Sequence[TensorSpec]) -> Tensors:
        """The tensors of an update; from memory when there was room for them.

        Raises:
            NotFoundError: the file is gone.
            IntegrityError: the file was changed.
            ShapeError: it does not fit.
        """
        cached = self._cache.get((device_id, digest))
        if cached is not None:
            return cached
        return decode_tensors(self._complete(device_id, digest).read(digest), specs)

    def _complete(self, device_id: str, digest: Digest) -> Blobs:
        blobs = self._blobs(device_id)
        if not blobs.has(digest):
            raise NotFoundError(f"update {digest} was not uploaded; upload it and submit again")
        return blobs

    def _blobs(self, device_id: str) -> Blobs:
        return Blobs(self._round / device_id)
