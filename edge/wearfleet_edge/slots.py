"""The models on disk: the one in use and the one before it, each with its signed manifest."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wearfleet_protos.errors import DataError, IntegrityError
from wearfleet_protos.manifest import MANIFEST_MEDIA_TYPE, ModelManifest
from wearfleet_protos.signing import verify
from wearfleet_protos.tensors import digest_of, parse_digest

from wearfleet_edge.state import atomic_write, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["InstalledModel", "Slots"]


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A verified model: digest of its signed manifest, the manifest, and the ONNX bytes."""

    manifest_digest: str
    manifest: ModelManifest
    model: bytes


class Slots:
    """Current and previous model.

    Args:
        folder: where they lie.
        keys: trusted raw public keys by key id.
    """

    def __init__(self, folder: Path, keys: Mapping[str, bytes]) -> None:
        self._folder = folder
        self._keys = keys
        self._pointer = folder / "slots.json"

    def current(self) -> InstalledModel | None:
        """The model in use, verified again from its signature on; None when there is none.

        Raises:
            IntegrityError: a file on disk was changed.
            DataError: a file on disk is missing.
        """
        digest = self._read_pointer().get("current", "")
        return self._load(digest) if digest else None

    def install(self, signed_manifest: bytes, model: bytes) -> InstalledModel:
        """Make a verified model the current one; the current one becomes the previous, older ones go.

        Args:
            signed_manifest: the signed document.
            model: ONNX bytes of its digest.

        Raises:
            IntegrityError: signature or digest is wrong; nothing changes.
        """
        manifest = self._verified(signed_manifest)
        if digest_of(model) != manifest.digest:
            raise IntegrityError(f"the model is {digest_of(model)}, its manifest says {manifest.digest}")
        digest = digest_of(signed_manifest)
        slot = self._slot(digest)
        slot.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(slot / "model.onnx", model)
        atomic_write(slot / "manifest.signed", signed_manifest)
        before = self._read_pointer().get("current", "")
        if before != digest:
            write_json(self._pointer, {"current": digest, "previous": before})
        self._forget_others()
        return InstalledModel(digest, manifest, model)

    def _load(self, digest: str) -> InstalledModel:
        slot = self._slot(digest)
        try:
            signed, model = (slot / "manifest.signed").read_bytes(), (slot / "model.onnx").read_bytes()
        except OSError as error:
            raise DataError(f"{slot}: the installed model cannot be read ({error})") from error
        manifest = self._verified(signed)
        if digest_of(signed) != digest or digest_of(model) != manifest.digest:
            raise IntegrityError(f"{slot}: the installed model was changed on disk; it will be fetched again")
        return InstalledModel(digest, manifest, model)

    def _verified(self, signed_manifest: bytes) -> ModelManifest:
        return ModelManifest.from_bytes(verify(signed_manifest, self._keys, MANIFEST_MEDIA_TYPE))

    def _read_pointer(self) -> dict[str, str]:
        return read_json(self._pointer) if self._pointer.exists() else {}

    def _slot(self, digest: str) -> Path:
        return self._folder / parse_digest(digest).removeprefix("sha256:")

    def _forget_others(self) -> None:
        kept = {self._slot(digest).name for digest in self._read_pointer().values() if digest}
        for path in self._folder.iterdir():
            if path.is_dir() and path.name not in kept:
                shutil.rmtree(path)
