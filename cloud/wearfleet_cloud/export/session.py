"""Run an exported model in ONNX Runtime as a small device does: one thread, no spinning."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from wearfleet_protos.errors import ModelContractError, ShapeError
from wearfleet_protos.manifest import MODEL_INPUT, MODEL_OUTPUTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Latency", "Session"]

_BATCH: Final = 256
_WARM_UP: Final = 200


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one call with one window, microseconds."""

    p50_us: float
    p99_us: float


class Session:
    """A loaded model.

    Args:
        data: the ONNX file.

    Raises:
        ModelContractError: ONNX Runtime refuses the file.
    """

    def __init__(self, data: bytes) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base but Exception
            raise ModelContractError(
                f"ONNX Runtime {ort.__version__} does not load the model: {error}"
            ) from error

    def run(self, x: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """The four outputs of raw windows (n, C, T).

        Raises:
            ShapeError: no windows.
        """
        if x.ndim != 3 or len(x) == 0:
            raise ShapeError(f"expected at least one window (n, C, T), got shape {x.shape}")
        names = list(MODEL_OUTPUTS)
        parts = [
            self._session.run(names, {MODEL_INPUT: np.ascontiguousarray(x[i : i + _BATCH])})
            for i in range(0, len(x), _BATCH)
        ]
        columns = zip(*parts, strict=True)
        return {name: np.concatenate(column) for name, column in zip(names, columns, strict=True)}

    def latency(self, window: NDArray[np.float32], repeats: int = 2000) -> Latency:
        """Time ``repeats`` single calls with a window (1, C, T), after a warm-up."""
        self.times_us(window, _WARM_UP)
        p50, p99 = np.percentile(self.times_us(window, repeats), (50, 99))
        return Latency(float(p50), float(p99))

    def times_us(self, window: NDArray[np.float32], repeats: int) -> NDArray[np.float64]:
        """(repeats,) microseconds that each call with a window (1, C, T) takes."""
        names, feed = list(MODEL_OUTPUTS), {MODEL_INPUT: window}
        times = np.empty(repeats)
        for index in range(repeats):
            begin = time.perf_counter_ns()
            self._session.run(names, feed)
            times[index] = time.perf_counter_ns() - begin
        return times / 1e3
