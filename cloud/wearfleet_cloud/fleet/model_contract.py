"""Check that an ONNX file is what its manifest says and offers what a device needs."""

from __future__ import annotations

import onnx
from google.protobuf.message import DecodeError
from wearfleet_protos.errors import ModelContractError
from wearfleet_protos.manifest import METADATA_KEYS, MODEL_INPUT, MODEL_OUTPUTS, ModelManifest, metadata_of
from wearfleet_protos.tensors import digest_of

__all__ = ["check_model"]


def check_model(data: bytes, manifest: ModelManifest) -> None:
    """Check digest, size, input, outputs, metadata and the named tensors.

    A manifest without tensors (a quantised model) promises none; one with tensors promises that each that the
    graph uses is an initialiser of that name and shape, so that it can be replaced.

    Args:
        data: the ONNX file.
        manifest: what it should be.

    Raises:
        ModelContractError: says what was expected and what came.
    """
    digest = digest_of(data)
    if len(data) != manifest.size_bytes or digest != manifest.digest:
        raise ModelContractError(
            f"expected {manifest.size_bytes} bytes with {manifest.digest}, got {len(data)} with {digest}"
        )
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelContractError(f"not an ONNX file: {error}") from error
    _check_ends(model.graph, manifest)
    _check_metadata(model, manifest)
    _check_tensors(model.graph, manifest)


def _check_ends(graph: onnx.GraphProto, manifest: ModelManifest) -> None:
    inputs = [(value.name, _shape(value)) for value in graph.input]
    wanted = [(MODEL_INPUT, (None, len(manifest.contract.channels), manifest.contract.window))]
    if inputs != wanted:
        raise ModelContractError(f"expected the input {wanted}, got {inputs}")
    outputs = tuple(value.name for value in graph.output)
    if outputs != MODEL_OUTPUTS:
        raise ModelContractError(f"expected the outputs {MODEL_OUTPUTS}, got {outputs}")
    classes = _shape(graph.output[0])[-1]
    if classes != len(manifest.contract.labels):
        raise ModelContractError(
            f"the manifest names {len(manifest.contract.labels)} labels, the graph has {classes}"
        )


def _check_metadata(model: onnx.ModelProto, manifest: ModelManifest) -> None:
    found = {entry.key: entry.value for entry in model.metadata_props}
    wanted = metadata_of(manifest)
    for key in METADATA_KEYS:
        if found.get(key) != wanted[key]:
            raise ModelContractError(
                f"metadata {key}: the manifest says {wanted[key]!r}, the file {found.get(key)!r}"
            )


def _check_tensors(graph: onnx.GraphProto, manifest: ModelManifest) -> None:
    held = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    specs = {spec.name: spec.shape for spec in manifest.tensors}
    for name in sorted(specs.keys() & held.keys()):
        if held[name] != specs[name]:
            raise ModelContractError(f"tensor {name}: the manifest says {specs[name]}, the file {held[name]}")
    missing = sorted(
        spec.name for spec in manifest.tensors if spec.name not in held and spec.role != "COUNTER"
    )
    if missing:
        raise ModelContractError(f"tensors {missing[:5]} of the manifest are no initialisers of the graph")


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Sizes of a value; None where a size is free."""
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
