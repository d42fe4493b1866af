"""The model registry: an ONNX file and its manifest become a signed, released version."""

from wearfleet_protos.manifest import MANIFEST_MEDIA_TYPE, ModelManifest
from wearfleet_protos.tensors import Digest

from wearfleet_cloud.fleet.signing import SigningKeys
from wearfleet_cloud.storage.audit import append_audit
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_cloud.storage.catalog import (
    PublishedModel,
    current_release,
    insert_artifact,
    insert_model,
    release_model,
)
from wearfleet_cloud.storage.database import Database

__all__ = ["ONNX_MEDIA_TYPE", "Registry"]

ONNX_MEDIA_TYPE = "application/vnd.onnx"


class Registry:
    """Publishes models and tells what the fleet should run.

    Args:
        database: catalogue of versions and releases.
        blobs: where the bytes are.
        keys: sign manifests.
    """

    def __init__(self, database: Database, blobs: Blobs, keys: SigningKeys) -> None:
        self._database, self._blobs, self._keys = database, blobs, keys

    def publish(
        self, model: bytes, manifest: ModelManifest, now_ns: int, *, release: bool = True
    ) -> PublishedModel:
        """Sign and store a new version, and make it the one that every device should run.

        Args:
            model: ONNX bytes.
            manifest: what they are.
            now_ns: present time.
            release: False stores the version without asking devices to run it.

        Raises:
            ModelContractError: the bytes are not what the manifest says, or lack what a device needs.
            ConflictError: the model line has this version or a higher one already.
        """
        from wearfleet_cloud.fleet.model_contract import check_model  # noqa: PLC0415 - loads onnx, which serving does not need

        check_model(model, manifest)
        document = self._keys.sign(manifest.to_bytes(), MANIFEST_MEDIA_TYPE)
        self._blobs.put(model, digest=manifest.digest)
        published = PublishedModel(
            manifest.model_id, manifest.version, self._blobs.put(document), manifest.digest, now_ns
        )
        with self._database.write() as connection:
            insert_artifact(connection, published.model_digest, len(model), ONNX_MEDIA_TYPE, now_ns)
            insert_artifact(connection, published.manifest_digest, len(document), MANIFEST_MEDIA_TYPE, now_ns)
            insert_model(connection, published)
            if release:
                release_model(connection, published.model_id, published.version, now_ns)
            subject = f"{published.model_id} {published.version}"
            append_audit(connection, now_ns, "model.publish", subject, published.manifest_digest)
        return published

    def current(self) -> tuple[PublishedModel, ModelManifest] | None:
        """What every device should run, with its manifest; None before the first release.

        Raises:
            IntegrityError: the stored manifest was changed.
        """
        with self._database.read() as connection:
            published = current_release(connection)
        return None if published is None else (published, self.manifest(published.manifest_digest))

    def manifest(self, digest: Digest) -> ModelManifest:
        """A signed manifest, checked.

        Raises:
            NotFoundError: it was never stored.
            IntegrityError: it was changed.
        """
        return ModelManifest.from_bytes(self._keys.verify(self._blobs.read(digest), MANIFEST_MEDIA_TYPE))

    def document_size(self, published: PublishedModel) -> int:
        """Bytes of the signed manifest of a version."""
        return self._blobs.size(published.manifest_digest)

    def model(self, published: PublishedModel) -> bytes:
        """The ONNX bytes of a version, checked.

        Raises:
            IntegrityError: they were changed.
        """
        return self._blobs.read(published.model_digest)
