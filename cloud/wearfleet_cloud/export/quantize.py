"""A smaller model: static int8 in QDQ form, calibrated on real windows, refused when it costs too much accuracy.

Only what the embedding is computed from is quantised; the head (1 % of the work) and the out-of-distribution score
stay float32. Normalisation is folded into the convolutions first, so there is nothing left to lay personal tensors
over: the manifest of a quantised model names no tensors. The threshold of the score is measured again, on the
quantised graph.

Source: Jacob et al. 2018, arXiv:1712.05877 (affine quantisation); weights symmetric per channel, activations
unsigned with the range seen in calibration.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
from onnxruntime.quantization import (  # type: ignore[import-untyped]
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from wearfleet_protos.errors import ConfigError, IntegrityError, ShapeError
from wearfleet_protos.manifest import MODEL_INPUT, ModelManifest

from wearfleet_cloud.export.graph_tidy import ancestors, tidy
from wearfleet_cloud.export.ood_score import threshold_of
from wearfleet_cloud.export.session import Latency, Session
from wearfleet_cloud.export.to_onnx import finish

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "DEFAULT_BUDGET",
    "QuantizationReport",
    "QuantizedModel",
    "balanced_choice",
    "quantize",
    "require_budget",
]

DEFAULT_BUDGET: Final = 0.01
"""Largest accepted loss of accuracy: one point."""

_PER_CLASS: Final = 32
_OPERATORS: Final = ("Conv", "MaxPool", "Relu", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """Quantised against float32, on the same validation windows.

    Args:
        windows: how many.
        accuracy_float32: share recognised before.
        accuracy_int8: share recognised after.
        per_class: label -> (before, after), for classes that occur.
        argmax_agreement: share of windows with the same most likely class.
        latency_float32: of one window.
        latency_int8: of one window; not always less on small models.
        size_float32: bytes.
        size_int8: bytes.
    """

    windows: int
    accuracy_float32: float
    accuracy_int8: float
    per_class: tuple[tuple[str, float, float], ...]
    argmax_agreement: float
    latency_float32: Latency
    latency_int8: Latency
    size_float32: int
    size_int8: int

    @property
    def loss(self) -> float:
        """Accuracy lost overall, as a share."""
        return self.accuracy_float32 - self.accuracy_int8


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedModel:
    """The int8 ONNX file, its manifest, and what it costs and gains."""

    data: bytes
    manifest: ModelManifest
    report: QuantizationReport


def quantize(
    data: bytes,
    manifest: ModelManifest,
    *,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    x_validation: NDArray[np.float32],
    y_validation: NDArray[np.int64],
    budget: float = DEFAULT_BUDGET,
) -> QuantizedModel:
    """Quantise an exported model.

    Args:
        data: the float32 ONNX file.
        manifest: its manifest.
        x: (n, C, T) raw source training windows; up to 32 of each class calibrate.
        y: (n,) their classes.
        x_validation: (m, C, T) raw source validation windows.
        y_validation: (m,) their classes.
        budget: largest accepted loss of accuracy, as a share.

    Raises:
        ConfigError: the budget is not in [0, 1].
        ShapeError: no windows.
        IntegrityError: the loss exceeds the budget; nothing is returned.
    """
    if not 0.0 <= budget <= 1.0:
        raise ConfigError(f"the budget is a share of accuracy between 0 and 1, got {budget}")
    graph = tidy(_quantized_graph(data, np.asarray(x[balanced_choice(y)])))
    before, after = Session(data), Session(graph.SerializeToString())
    outputs = before.run(x_validation), after.run(x_validation)
    threshold = threshold_of(outputs[1]["ood_score"])
    small, own = finish(graph, replace(manifest, ood_threshold=threshold, tensors=()))
    predicted = outputs[0]["logits"].argmax(axis=1), outputs[1]["logits"].argmax(axis=1)
    one = np.ascontiguousarray(x_validation[:1])
    report = QuantizationReport(
        windows=len(y_validation),
        accuracy_float32=float((predicted[0] == y_validation).mean()),
        accuracy_int8=float((predicted[1] == y_validation).mean()),
        per_class=_per_class(manifest.contract.labels, y_validation, predicted),
        argmax_agreement=float((predicted[0] == predicted[1]).mean()),
        latency_float32=before.latency(one),
        latency_int8=after.latency(one),
        size_float32=len(data),
        size_int8=len(small),
    )
    require_budget(report, budget)
    return QuantizedModel(small, own, report)


def require_budget(report: QuantizationReport, budget: float) -> None:
    """Refuse a quantised model that lost too much.

    Raises:
        IntegrityError: the overall loss exceeds the budget; names the class that lost most.
    """
    if report.loss > budget:
        worst = max(report.per_class, key=lambda row: row[1] - row[2])
        raise IntegrityError(
            f"int8 loses {report.loss:.2%} accuracy, at most {budget:.2%} is allowed (most on {worst[0]}: "
            f"{worst[1]:.1%} to {worst[2]:.1%}); keep float32, or raise the budget"
        )


def balanced_choice(y: NDArray[np.int64], per_class: int = _PER_CLASS) -> NDArray[np.int64]:
    """Positions of up to ``per_class`` windows of each class, evenly spread over its windows, ascending.

    Raises:
        ShapeError: no windows.
    """
    if len(y) == 0:
        raise ShapeError("calibration needs at least one window")
    chosen = []
    for label in np.unique(y):
        of_class = np.flatnonzero(y == label)
        chosen.append(
            of_class[np.linspace(0, len(of_class) - 1, min(len(of_class), per_class)).astype(np.int64)]
        )
    return np.sort(np.concatenate(chosen))


def _per_class(
    labels: tuple[str, ...], y: NDArray[np.int64], predicted: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[tuple[str, float, float], ...]:
    rows = []
    for label in np.unique(y):
        own = y == label
        rows.append(
            (
                labels[label],
                float((predicted[0][own] == label).mean()),
                float((predicted[1][own] == label).mean()),
            )
        )
    return tuple(rows)


def _quantized_graph(data: bytes, calibration: NDArray[np.float32]) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        folded, small = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
        graph = _folded(data, folded)
        inside = ancestors(graph.graph, ["embedding"])
        chosen = [n.name for n in graph.graph.node if n.op_type in _OPERATORS and n.output[0] in inside]
        root = logging.getLogger()  # the quantiser advises on the root logger
        level = root.level
        root.setLevel(logging.ERROR)
        try:
            quantize_static(
                graph,
                small,
                _Windows(calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_OPERATORS),
                nodes_to_quantize=chosen,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
        finally:
            root.setLevel(level)
        return onnx.load(small)


def _folded(data: bytes, path: Path) -> onnx.ModelProto:
    """The graph as ONNX Runtime simplifies it, still of standard operators."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(path)
    for number, node in enumerate(graph.graph.node):
        node.name = f"{node.op_type}_{number}"
    return graph


class _Windows(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
    """Feeds calibration windows one by one."""

    def __init__(self, windows: NDArray[np.float32]) -> None:
        self._feed: Iterator[dict[str, NDArray[np.float32]]] = ({MODEL_INPUT: w[None]} for w in windows)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next feed, None at the end."""
        return next(self._feed, None)
