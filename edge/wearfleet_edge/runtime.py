"""Recognise windows with ONNX Runtime, after the model's contract was checked.

One thread, no spinning, no memory arena: a wearable's agent must be small and leave the processor alone.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from wearfleet_protos.errors import IntegrityError, ModelContractError, ShapeError
from wearfleet_protos.labels import UNLABELLED
from wearfleet_protos.manifest import MODEL_INPUT, MODEL_OUTPUTS, ModelManifest, metadata_of
from wearfleet_protos.tensors import TensorRole, check_finite, digest_of

from wearfleet_edge.graph import GraphSummary, inspect_graph, overlay_tensors
from wearfleet_edge.memory import release_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from wearfleet_protos.windowing import LabelledWindows

__all__ = ["Evaluation", "Latency", "Personal", "Recogniser", "Recognition", "make_session"]

_PROVIDERS: Final = ["CPUExecutionProvider"]
_BATCH: Final = 32
_WARM_UP: Final = 20


@dataclass(frozen=True, slots=True)
class Recognition:
    """What the model says about one window: ``probabilities`` (K,) float32."""

    label: int
    probabilities: NDArray[np.float32]
    ood_score: float
    out_of_distribution: bool
    inference_ns: int


@dataclass(frozen=True, slots=True)
class Personal:
    """What makes a model personal: tensors to lay over the graph's, and the wearer's own threshold."""

    tensors: dict[str, NDArray[np.generic]]
    ood_threshold: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Recognition quality on labelled windows: ``confusion`` (K, K) counts, rows are the true classes."""

    correct: int
    count: int
    confusion: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """Share of correct windows; 0 when there are none."""
        return self.correct / self.count if self.count else 0.0


class Latency:
    """Median and 99th percentile of the last inference times.

    Args:
        size: how many times are kept.
    """

    def __init__(self, size: int = 2048) -> None:
        self._times_ns: deque[int] = deque(maxlen=size)

    def add(self, time_ns: int) -> None:
        """Remember one time."""
        self._times_ns.append(time_ns)

    def quantile_us(self, share: float) -> float:
        """The quantile in microseconds; 0 when nothing was measured."""
        times = tuple(self._times_ns)
        return float(np.quantile(times, share)) / 1e3 if times else 0.0


class Recogniser:
    """One loaded model, checked and warmed up.

    Args:
        model: bytes of the ONNX file.
        manifest: its verified description.
        personal: tensors laid over the graph's initialisers; None for the model as released.

    Raises:
        IntegrityError: the bytes are not those of the manifest, or the graph is not allowed.
        ModelContractError: inputs, outputs or metadata differ from the manifest, or personal tensors do not fit.
    """

    def __init__(self, model: bytes, manifest: ModelManifest, personal: Personal | None = None) -> None:
        if len(model) != manifest.size_bytes or digest_of(model) != manifest.digest:
            raise IntegrityError(
                f"model file differs from its manifest: expected {manifest.size_bytes} bytes {manifest.digest}, "
                f"got {len(model)} bytes {digest_of(model)}"
            )
        summary = inspect_graph(model)
        _check_metadata(summary, manifest)
        graph = overlay_tensors(model, summary, _of_graph(summary, manifest, personal)) if personal else model
        self.manifest = manifest
        self.personalised = personal is not None
        self.ood_threshold = personal.ood_threshold if personal else manifest.ood_threshold
        self._session = make_session(bytes(graph))
        _check_signature(self._session, manifest)
        self._bind()
        for _ in range(_WARM_UP):
            self.recognise(np.zeros(self._shape, np.float32))

    def recognise(self, window: NDArray[np.float32]) -> Recognition:
        """Recognise one window; not safe for two threads at once.

        Args:
            window: (C, T) float32, finite, in the units of the manifest.

        Raises:
            ShapeError: another shape or dtype, or a value that is not finite.
        """
        if window.shape != self._shape or window.dtype != np.float32:
            raise ShapeError(f"expected a window float32 {self._shape}, got {window.dtype} {window.shape}")
        begin = time.perf_counter_ns()
        self._input.update_inplace(window[None])
        self._session.run_with_iobinding(self._binding)
        probabilities: NDArray[np.float32] = self._probabilities.numpy()[0].copy()
        score = float(self._score.numpy()[0])
        taken = time.perf_counter_ns() - begin
        label = int(probabilities.argmax())
        if not np.isfinite(probabilities[label]) or not np.isfinite(score):
            raise ShapeError("the model answered with NaN or infinity; the window holds values out of range")
        return Recognition(label, probabilities, score, score > self.ood_threshold, taken)

    def evaluate(self, windows: LabelledWindows) -> Evaluation:
        """Compare with labels; windows without a label are left out."""
        labelled = windows.y != UNLABELLED
        known = windows if labelled.all() else windows.select(labelled)
        classes = len(self.manifest.contract.labels)
        confusion = np.zeros((classes, classes), np.int64)
        for begin in range(0, len(known), _BATCH):
            part = slice(begin, begin + _BATCH)
            said = self._session.run(["logits"], {MODEL_INPUT: known.x[part]})[0].argmax(axis=1)
            np.add.at(confusion, (known.y[part], said), 1)
        return Evaluation(int(np.trace(confusion)), len(known), confusion)

    def ood_scores(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N,) scores of windows (N, C, T)."""
        parts = [
            self._session.run(["ood_score"], {MODEL_INPUT: x[begin : begin + _BATCH]})[0].reshape(-1)
            for begin in range(0, len(x), _BATCH)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _bind(self) -> None:
        contract = self.manifest.contract
        self._shape = (len(contract.channels), contract.window)
        self._input = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, *self._shape), np.float32))
        self._probabilities = ort.OrtValue.ortvalue_from_numpy(
            np.zeros((1, len(contract.labels)), np.float32)
        )
        self._score = ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input(MODEL_INPUT, self._input)
        self._binding.bind_ortvalue_output("probabilities", self._probabilities)
        self._binding.bind_ortvalue_output("ood_score", self._score)


def make_session(graph: bytes) -> ort.InferenceSession:
    """An ONNX Runtime session for a small device.

    Making one is much code that runs once: memory is given back before and after, so that two such peaks never meet.

    Args:
        graph: ONNX bytes that passed :func:`wearfleet_edge.graph.inspect_graph`.

    Raises:
        ModelContractError: ONNX Runtime does not accept the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    release_memory()
    try:
        session = ort.InferenceSession(graph, options, providers=_PROVIDERS)
    except Exception as error:  # the runtime raises types of its own that share no base
        raise ModelContractError(
            f"ONNX Runtime {ort.__version__} does not accept the graph: {error}"
        ) from error
    release_memory()
    return session


def _check_metadata(summary: GraphSummary, manifest: ModelManifest) -> None:
    for key, wanted in metadata_of(manifest).items():
        found = summary.metadata.get(key)
        if found != wanted:
            raise ModelContractError(f"metadata {key} must be {wanted!r} as in the manifest, got {found!r}")


def _check_signature(session: ort.InferenceSession, manifest: ModelManifest) -> None:
    contract = manifest.contract
    inputs = {i.name: (i.type, list(i.shape)) for i in session.get_inputs()}
    wanted = [len(contract.channels), contract.window]
    kind, shape = inputs.get(MODEL_INPUT, ("", []))
    if (
        set(inputs) != {MODEL_INPUT}
        or kind != "tensor(float)"
        or shape[1:] != wanted
        or isinstance(shape[0], int)
    ):
        raise ModelContractError(
            f"expected one input {MODEL_INPUT} float32 [N, {wanted[0]}, {wanted[1]}], got {inputs}"
        )
    outputs = {o.name: o.type for o in session.get_outputs()}
    missing = [name for name in MODEL_OUTPUTS if outputs.get(name) != "tensor(float)"]
    if missing:
        raise ModelContractError(f"the model has no float32 output {missing}; it offers {outputs}")


def _of_graph(
    summary: GraphSummary, manifest: ModelManifest, personal: Personal
) -> dict[str, NDArray[np.generic]]:
    """The personal tensors that the graph uses; counters have no place in it."""
    check_finite(personal.tensors)
    roles = {t.name: t.role for t in manifest.tensors}
    unknown = sorted(personal.tensors.keys() - roles.keys())
    if unknown:
        raise ModelContractError(f"personal tensors {unknown[:3]} are not part of the model")
    return {
        name: array
        for name, array in personal.tensors.items()
        if name in summary.initializers or roles[name] is not TensorRole.COUNTER
    }
