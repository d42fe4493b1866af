"""From a trained classifier to a checked release, in one call and without touching a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_models import Classifier
from wearfleet_protos.manifest import ModelManifest
from wearfleet_protos.plan import InputContract

from wearfleet_cloud.export.ood_score import DEFAULT_METHOD, DEFAULT_RANK, OodMethod
from wearfleet_cloud.export.parity import ParityReport, parity_report, require_parity
from wearfleet_cloud.export.scored_classifier import fit_ood, scored_classifier
from wearfleet_cloud.export.to_onnx import ReleaseInfo, export_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Release", "export_classifier"]

_PARITY_WINDOWS: Final = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Release:
    """An exported model that passed its checks: the ONNX file, its manifest, and the parity that was found."""

    data: bytes
    manifest: ModelManifest
    parity: ParityReport


def export_classifier(
    model: Classifier,
    contract: InputContract,
    release: ReleaseInfo,
    *,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    x_validation: NDArray[np.float32],
    method: OodMethod = DEFAULT_METHOD,
    rank: int = DEFAULT_RANK,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Release:
    """Fit the out-of-distribution score, export, and compare with torch on real validation windows.

    Args:
        model: trained; it is left as it was.
        contract: the windows and labels it was trained on.
        release: origin of the model.
        x: (n, C, T) raw source training windows.
        y: (n,) their classes.
        x_validation: (m, C, T) raw source validation windows; up to 1024 of them, evenly spread, are compared.
        method: which score.
        rank: of its covariance.
        on_stage: told what begins.

    Raises:
        ShapeError: no windows, or they do not fit the model.
        ConfigError: unknown method.
        ModelContractError: the graph is not what a device needs.
        IntegrityError: the exported model does not compute what torch computes.
    """
    on_stage("fitting the out-of-distribution score")
    ood = fit_ood(model, x, y, x_validation, method=method, rank=rank)
    on_stage("writing the ONNX graph")
    data, manifest = export_bytes(model, contract, ood, release)
    on_stage("comparing ONNX Runtime with torch")
    chosen = np.unique(
        np.linspace(0, len(x_validation) - 1, min(len(x_validation), _PARITY_WINDOWS)).astype(np.int64)
    )
    report = parity_report(scored_classifier(model, ood), data, np.asarray(x_validation[chosen]))
    require_parity(report)
    return Release(data, manifest, report)
