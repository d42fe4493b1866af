"""Write a trained classifier as one ONNX file that is the whole model.

In: ``window`` (N, C, T) float32 in raw units, N free. Out: ``logits``, ``probabilities``, ``embedding``,
``ood_score``. Initialisers have the names of the classifier's ``state_dict`` and normalisation layers stay nodes of
their own, so every tensor of a person can be laid over the graph: by writing it over the initialiser in the bytes
that are loaded, or with ``SessionOptions.add_initializer`` and graph optimisation off. With optimisation on the
latter is silently wrong: ONNX Runtime folds and re-orders the file's own values before it looks at the new ones.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import onnx
import torch
from wearfleet_models import Classifier, tensor_specs
from wearfleet_protos.errors import ModelContractError, ShapeError
from wearfleet_protos.manifest import MODEL_INPUT, MODEL_OUTPUTS, ModelManifest, metadata_of
from wearfleet_protos.plan import InputContract
from wearfleet_protos.tensors import digest_of

from wearfleet_cloud.export.graph_tidy import tidy
from wearfleet_cloud.export.scored_classifier import OodStatistics, ScoredClassifier, scored_classifier
from wearfleet_cloud.fleet.model_contract import check_model

__all__ = ["OPSET", "ReleaseInfo", "export_bytes", "export_model", "finish", "write_release"]

OPSET: Final = 18


@dataclass(frozen=True, slots=True)
class ReleaseInfo:
    """What a model file says about its origin.

    Args:
        model_id: name of the model line.
        version: grows with each release of the line.
        train_run: identity of the training run.
        license: of the model.
        simulated: True when it was trained on simulated data.
        created_ns: time of the export, nanoseconds since 1970 UTC; in the manifest only.
    """

    model_id: str
    version: int
    train_run: str
    license: str
    simulated: bool
    created_ns: int


def export_model(
    model: Classifier, contract: InputContract, ood: OodStatistics, path: Path, release: ReleaseInfo
) -> ModelManifest:
    """Write ``path`` and, beside it, ``<stem>.manifest.json``. Arguments and errors as :func:`export_bytes`."""
    data, manifest = export_bytes(model, contract, ood, release)
    write_release(path, data, manifest)
    return manifest


def export_bytes(
    model: Classifier, contract: InputContract, ood: OodStatistics, release: ReleaseInfo
) -> tuple[bytes, ModelManifest]:
    """The ONNX file and its manifest; equal inputs give equal bytes.

    Args:
        model: trained; it is left as it was.
        contract: the windows and labels it was trained on.
        ood: from :func:`wearfleet_cloud.export.scored_classifier.fit_ood`.
        release: origin of the model.

    Raises:
        ShapeError: the contract does not fit the model.
        ModelContractError: the graph is not what a device needs.
    """
    spec = model.spec
    expected = (spec.channels, spec.window, spec.classes)
    given = (len(contract.channels), contract.window, len(contract.labels))
    if expected != given:
        raise ShapeError(f"the model has (channels, window, classes) {expected}, the contract says {given}")
    graph = tidy(_trace(scored_classifier(model, ood), spec.channels, spec.window))
    provisional = ModelManifest(
        model_id=release.model_id,
        version=release.version,
        digest=digest_of(b""),
        size_bytes=1,
        contract=contract,
        ood_method=ood.method,
        ood_threshold=ood.threshold,
        tensors=tensor_specs(model),
        train_run=release.train_run,
        license=release.license,
        created_ns=release.created_ns,
        simulated=release.simulated,
    )
    return finish(graph, provisional)


def finish(graph: onnx.ModelProto, manifest: ModelManifest) -> tuple[bytes, ModelManifest]:
    """Stamp a graph with a manifest's metadata and give the manifest the digest and size of the bytes.

    Raises:
        ModelContractError: the graph is not what the manifest says.
    """
    stamped = onnx.ModelProto()
    stamped.CopyFrom(graph)
    onnx.helper.set_model_props(stamped, dict(sorted(metadata_of(manifest).items())))
    try:
        onnx.checker.check_model(stamped, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelContractError(f"the exported graph is not valid ONNX: {error}") from error
    data = stamped.SerializeToString(deterministic=True)
    final = replace(manifest, digest=digest_of(data), size_bytes=len(data))
    check_model(data, final)
    return data, final


def write_release(path: Path, data: bytes, manifest: ModelManifest) -> Path:
    """Write the model and its manifest, each by rename; returns the manifest's path, ``<stem>.manifest.json``."""
    manifest_path = path.with_suffix(".manifest.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in ((path, data), (manifest_path, manifest.to_bytes())):
        part = target.with_name(target.name + ".part")
        part.write_bytes(content)
        part.replace(target)
    return manifest_path


def _trace(scored: ScoredClassifier, channels: int, window: int) -> onnx.ModelProto:
    """The graph of a model. The exporter gets a captured program: it would capture recurrent layers as loops."""
    example = torch.zeros(2, channels, window)
    shapes = {"window": {0: torch.export.Dim("N")}}
    with _quiet_exporter():
        captured = torch.export.export(scored, (example,), dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            captured,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            external_data=False,
            input_names=[MODEL_INPUT],
            output_names=list(MODEL_OUTPUTS),
            dynamic_shapes=shapes,
        )
    assert program is not None  # the dynamo exporter always returns one
    return program.model_proto


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence two messages of torch's exporter that say nothing about our graph."""
    logger = logging.getLogger(
        "torch.onnx._internal.exporter._registration"
    )  # "torchvision is not installed"
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
