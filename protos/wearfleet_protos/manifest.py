"""The manifest of a released model: what the file is, what it needs, and every tensor with its role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from wearfleet_protos.canonical import canonical_json, parse_json, take
from wearfleet_protos.errors import ProtocolError, WearfleetError
from wearfleet_protos.plan import (
    InputContract,
    contract_from_json,
    contract_to_json,
    tensor_spec_from_json,
)
from wearfleet_protos.tensors import Digest, TensorSpec, parse_digest, schema_hash

__all__ = [
    "MANIFEST_MEDIA_TYPE",
    "MAX_MODEL_BYTES",
    "METADATA_KEYS",
    "MODEL_INPUT",
    "MODEL_OUTPUTS",
    "ModelManifest",
    "metadata_of",
]

MANIFEST_MEDIA_TYPE: Final = "application/vnd.wearfleet.manifest.v1+json"
MAX_MODEL_BYTES: Final = 64 * 1024 * 1024
"""Largest ONNX model that a device accepts, in bytes."""

MODEL_INPUT: Final = "window"
MODEL_OUTPUTS: Final = ("logits", "probabilities", "embedding", "ood_score")

METADATA_KEYS: Final = tuple(
    f"wearfleet.{name}"
    for name in (
        "schema",
        "model_id",
        "version",
        "labels",
        "channels",
        "units",
        "rate_hz",
        "window",
        "stride",
        "ood_method",
        "ood_threshold",
        "train_run",
        "license",
        "simulated",
    )
)
"""Keys that every exported ONNX file carries in ``metadata_props``."""


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """Signed description of one ONNX model.

    Args:
        model_id: name of the model line.
        version: grows with each release of the line; a device never goes back by itself.
        digest: content address of the ONNX file.
        size_bytes: size of the ONNX file.
        contract: windows and labels.
        ood_method: ``max-probability``, ``energy``, ``mahalanobis`` or ``cosine``.
        ood_threshold: a score above it is out of distribution.
        tensors: parameters and buffers with their roles.
        train_run: identity of the training run.
        license: of the model.
        created_ns: time of the export, nanoseconds since 1970 UTC.
        simulated: True when it was trained on simulated data.

    Raises:
        ProtocolError: a field is out of its range.
    """

    model_id: str
    version: int
    digest: Digest
    size_bytes: int
    contract: InputContract
    ood_method: str
    ood_threshold: float
    tensors: tuple[TensorSpec, ...]
    train_run: str
    license: str
    created_ns: int
    simulated: bool

    def __post_init__(self) -> None:
        if self.version < 1:
            raise ProtocolError(f"manifest version must be at least 1, got {self.version}")
        if not 0 < self.size_bytes <= MAX_MODEL_BYTES:
            raise ProtocolError(f"model size must be 1 to {MAX_MODEL_BYTES} bytes, got {self.size_bytes}")
        if len({t.name for t in self.tensors}) != len(self.tensors):
            raise ProtocolError("manifest names a tensor twice")

    @property
    def schema_hash(self) -> Digest:
        """Models with equal hashes can be averaged with each other."""
        return schema_hash(self.tensors)

    def to_bytes(self) -> bytes:
        """Canonical JSON bytes."""
        return canonical_json(
            {
                "model_id": self.model_id,
                "version": self.version,
                "digest": self.digest,
                "size_bytes": self.size_bytes,
                "contract": contract_to_json(self.contract),
                "ood_method": self.ood_method,
                "ood_threshold": self.ood_threshold,
                "tensors": [t.to_json() for t in self.tensors],
                "train_run": self.train_run,
                "license": self.license,
                "created_ns": self.created_ns,
                "simulated": self.simulated,
            }
        )

    @staticmethod
    def from_bytes(data: bytes) -> ModelManifest:
        """Parse and check canonical bytes.

        Raises:
            ProtocolError: not a well-formed manifest.
        """
        try:
            return _from_json(parse_json(data, "manifest"))
        except ProtocolError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, WearfleetError) as error:
            raise ProtocolError(f"manifest has a field of the wrong type or range: {error}") from error


def _from_json(value: Mapping[str, Any]) -> ModelManifest:
    row = take(value, ModelManifest, "manifest")
    return ModelManifest(
        model_id=str(row["model_id"]),
        version=int(row["version"]),
        digest=parse_digest(str(row["digest"])),
        size_bytes=int(row["size_bytes"]),
        contract=contract_from_json(row["contract"]),
        ood_method=str(row["ood_method"]),
        ood_threshold=float(row["ood_threshold"]),
        tensors=tuple(tensor_spec_from_json(t) for t in row["tensors"]),
        train_run=str(row["train_run"]),
        license=str(row["license"]),
        created_ns=int(row["created_ns"]),
        simulated=bool(row["simulated"]),
    )


def metadata_of(manifest: ModelManifest) -> dict[str, str]:
    """The ``metadata_props`` that the ONNX file of this manifest carries (all but digest and size)."""
    contract = manifest.contract
    values = {
        "schema": "1",
        "model_id": manifest.model_id,
        "version": str(manifest.version),
        "labels": canonical_json(list(contract.labels)).decode(),
        "channels": canonical_json([c.name for c in contract.channels]).decode(),
        "units": canonical_json([c.unit for c in contract.channels]).decode(),
        "rate_hz": repr(contract.rate_hz),
        "window": str(contract.window),
        "stride": str(contract.stride),
        "ood_method": manifest.ood_method,
        "ood_threshold": repr(manifest.ood_threshold),
        "train_run": manifest.train_run,
        "license": manifest.license,
        "simulated": "true" if manifest.simulated else "false",
    }
    return {f"wearfleet.{name}": value for name, value in values.items()}
