"""The model registry: an ONNX file and its manifest become a signed, released version."""

import onnx
from wearfleet_protos.errors import IntegrityError, ModelContractError
from wearfleet_protos.manifest import (
    MANIFEST_MEDIA_TYPE,
    MODEL_INPUT,
    MODEL_OUTPUTS,
    ModelManifest,
    metadata_of,
)
from wearfleet_protos.tensors import Digest, digest_of

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

__all__ = ["ONNX_MEDIA_TYPE", "Registry", "check_model"]

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
            IntegrityError: the bytes are not what the manifest says.
            ModelContractError: the ONNX file lacks an input, output or metadata entry.
            ConflictError: the model line has this version or a higher one already.
        """
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


def check_model(model: bytes, manifest: ModelManifest) -> None:
    """Check that ONNX bytes are what their manifest says.

    Raises:
        IntegrityError: size or digest differ, or it is not an ONNX file.
        ModelContractError: an input, output or metadata entry is missing or differs.
    """
    if len(model) != manifest.size_bytes or digest_of(model) != manifest.digest:
        raise IntegrityError(
            f"the model has {len(model)} bytes and digest {digest_of(model)}, its manifest says "
            f"{manifest.size_bytes} and {manifest.digest}; export it again"
        )
    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's own error types differ between its versions
        raise IntegrityError(f"not an ONNX file: {error}") from error
    _check_contract(proto, manifest)


def _check_contract(proto: onnx.ModelProto, manifest: ModelManifest) -> None:
    inputs, outputs = {i.name for i in proto.graph.input}, {o.name for o in proto.graph.output}
    if MODEL_INPUT not in inputs or not set(MODEL_OUTPUTS) <= outputs:
        raise ModelContractError(
            f"the model must have input {MODEL_INPUT!r} and outputs {MODEL_OUTPUTS}, has {inputs} and {outputs}"
        )
    found = {entry.key: entry.value for entry in proto.metadata_props}
    for key, value in metadata_of(manifest).items():
        if found.get(key) != value:
            raise ModelContractError(
                f"metadata {key}: the manifest says {value!r}, the model {found.get(key)!r}"
            )
