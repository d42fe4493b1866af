"""Is the exported file the model that was trained? Torch and ONNX Runtime on the same real windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_models.necks import Branches
from wearfleet_protos.errors import IntegrityError
from wearfleet_protos.manifest import MODEL_OUTPUTS

from wearfleet_cloud.export.scored_classifier import ScoredClassifier, outputs_of
from wearfleet_cloud.export.session import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["OutputParity", "ParityReport", "parity_report", "require_parity"]

_EPSILON: Final = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, slots=True)
class OutputParity:
    """One output: largest absolute difference, the largest allowed, and the largest absolute value."""

    name: str
    max_abs_difference: float
    tolerance: float
    scale: float


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Torch against ONNX Runtime.

    Args:
        windows: how many were compared.
        argmax_agreement: share of windows with the same most likely class.
        max_abs_difference: of the logits.
        outputs: every output.
    """

    windows: int
    argmax_agreement: float
    max_abs_difference: float
    outputs: tuple[OutputParity, ...]


def parity_report(scored: ScoredClassifier, data: bytes, windows: NDArray[np.float32]) -> ParityReport:
    """Compare all outputs on real windows.

    The tolerance of an output is 4 x float32 epsilon x sqrt(n) x (its largest absolute value, at least 1), n being
    the sum of the reduction lengths of all matrices: rounding errors of sums taken in another order add up like a
    random walk, and four standard deviations are allowed.

    Args:
        scored: the torch side, in evaluation mode.
        data: the ONNX file.
        windows: (n, C, T) raw units.

    Raises:
        ShapeError: no windows.
        ModelContractError: ONNX Runtime does not load the file.

    Source: Higham and Mary 2019, "A new approach to probabilistic rounding error analysis", theorem 2.4.
    """
    reference = outputs_of(scored, windows)
    exported = Session(data).run(windows)
    relative = 4.0 * _EPSILON * math.sqrt(_reduction_length(scored))
    outputs = []
    for name in MODEL_OUTPUTS:
        difference = np.abs(reference[name].astype(np.float64) - exported[name])
        scale = max(1.0, float(np.abs(reference[name]).max()))
        outputs.append(OutputParity(name, float(difference.max()), relative * scale, scale))
    same = reference["logits"].argmax(axis=1) == exported["logits"].argmax(axis=1)
    return ParityReport(len(windows), float(same.mean()), outputs[0].max_abs_difference, tuple(outputs))


def require_parity(report: ParityReport) -> None:
    """Refuse a file that does not compute what the trained model computes.

    Raises:
        IntegrityError: a class differs, or an output is off by more than its tolerance (or is NaN).
    """
    if report.argmax_agreement < 1.0:
        raise IntegrityError(
            f"the exported model names another class than torch on {1 - report.argmax_agreement:.2%} of "
            f"{report.windows} windows; expected the same class on all: do not ship it"
        )
    for output in report.outputs:
        if not output.max_abs_difference <= output.tolerance:
            raise IntegrityError(
                f"{output.name} of the exported model differs from torch by {output.max_abs_difference:.3g}, "
                f"at most {output.tolerance:.3g} is rounding: do not ship it"
            )


def _reduction_length(scored: ScoredClassifier) -> int:
    """Sum over all matrices of the number of products that each of their outputs adds up."""
    fan_in = 0
    for module in scored.modules():
        for matrix in (p for p in module.parameters(recurse=False) if p.ndim >= 2):
            results = matrix.shape[:2] if isinstance(module, Branches) else matrix.shape[:1]
            fan_in += matrix.numel() // results.numel()
    return fan_in + sum(b.shape[0] for b in scored.ood.buffers() if b.ndim == 2)
