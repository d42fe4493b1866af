"""Bring this device to the model that the cloud wants, or say why not; the old model stays until the new one runs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from wearfleet_protos.errors import IntegrityError, ProtocolError, ShapeError
from wearfleet_protos.manifest import MANIFEST_MEDIA_TYPE, ModelManifest
from wearfleet_protos.signing import MAX_SIGNED_BYTES, verify

from wearfleet_edge.runtime import Recogniser

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wearfleet_edge.artifacts import ArtifactStore
    from wearfleet_edge.models import ActiveModel
    from wearfleet_edge.slots import Slots
    from wearfleet_edge.transport.cloud import Desired

__all__ = ["Updater", "require_newer"]

_LOG = logging.getLogger(__name__)


class Updater:
    """Turns a wanted state into an installed model.

    Args:
        artifacts: where bytes come from.
        slots: where models lie.
        active: the model in use.
        keys: trusted raw public keys by key id.
    """

    def __init__(
        self, artifacts: ArtifactStore, slots: Slots, active: ActiveModel, keys: Mapping[str, bytes]
    ) -> None:
        self._artifacts = artifacts
        self._slots = slots
        self._active = active
        self._keys = keys
        self._refused_digest = ""
        self.refusal = ""

    def consider(self, desired: Desired) -> bool:
        """Install what is wanted, unless it is in use or was refused before.

        Args:
            desired: from a heartbeat.

        Returns:
            True when another model is in use now.

        Raises:
            TransportError: the network failed; the next heartbeat tries again.
        """
        installed = self._active.installed
        digest = desired.manifest_digest
        if (
            not digest
            or digest == self._refused_digest
            or (installed and installed.manifest_digest == digest)
        ):
            return False
        try:
            self._install(desired)
        except (IntegrityError, ProtocolError, ShapeError) as error:
            self._refused_digest = digest
            self.refusal = f"{type(error).__name__}: {error}"
            _LOG.error("refused model version %d: %s", desired.model_version, error)
            return False
        self._refused_digest = self.refusal = ""
        return True

    def _install(self, desired: Desired) -> None:
        signed = self._artifacts.fetch(desired.manifest_digest, MAX_SIGNED_BYTES)
        manifest = ModelManifest.from_bytes(verify(signed, self._keys, MANIFEST_MEDIA_TYPE))
        if manifest.version != desired.model_version:
            raise IntegrityError(
                f"version {desired.model_version} was wanted, the manifest says {manifest.version}"
            )
        installed = self._active.installed
        if installed is not None:
            require_newer(manifest, installed.manifest)
        model = self._artifacts.fetch(manifest.digest, manifest.size_bytes)
        Recogniser(model, manifest)  # checked and run once before anything on disk changes
        self._active.use(self._slots.install(signed, model), None)
        self._artifacts.keep_only(())
        _LOG.info("installed model %s version %d", manifest.model_id, manifest.version)


def require_newer(wanted: ModelManifest, present: ModelManifest) -> None:
    """A device never goes back by itself, and never to another release with the same number.

    Raises:
        IntegrityError: the wanted version is not above the present one.
    """
    if wanted.version <= present.version:
        raise IntegrityError(
            f"version {wanted.version} of {wanted.model_id} is not newer than version {present.version} in use"
        )
