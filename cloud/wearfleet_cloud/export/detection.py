"""How well out-of-distribution scores tell unknown windows from known ones.

Sets (specs/ood.md 3.4.1): windows of activities that were left out of training, against known activities of the same
people; and windows of the held-out domain (a person, a position, ...), against the validation windows of the sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score  # type: ignore[import-untyped]
from wearfleet_models import Classifier
from wearfleet_protos.errors import DataError

from wearfleet_cloud.data.prepared import Prepared
from wearfleet_cloud.data.scenarios import build_scenario
from wearfleet_cloud.export.ood_score import DEFAULT_RANK, OOD_METHODS, OodMethod
from wearfleet_cloud.export.run_folder import Run, scenario_of_run, windows_of_run
from wearfleet_cloud.export.scored_classifier import fit_ood, outputs_of, scored_classifier

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Detection", "UnknownWindows", "compare_scores", "detection", "unknown_windows"]

_TRUE_POSITIVE_RATE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Detection:
    """How well one score tells unknown from known.

    Args:
        auroc: chance that an unknown window scores above a known one, ties half.
        aupr_in: average precision with the known windows as positives.
        aupr_out: average precision with the unknown windows as positives.
        fpr95: share of unknown windows that pass as known when 95 % of the known do.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr95: float


@dataclass(frozen=True, slots=True, eq=False)
class UnknownWindows:
    """A set to detect: ``inside`` (n, C, T) known, ``outside`` (m, C, T) unknown, raw units."""

    name: str
    inside: NDArray[np.float32]
    outside: NDArray[np.float32]


def detection(inside: NDArray[np.float32], outside: NDArray[np.float32]) -> Detection:
    """Compare the scores of known and unknown windows.

    Args:
        inside: (n,) scores of known windows.
        outside: (m,) scores of unknown windows; should be larger.

    Raises:
        DataError: one of the two is empty.

    Source: Hendrycks and Gimpel 2017, arXiv:1610.02136, section 2 (AUROC, AUPR In and Out); Liang et al. 2018,
    arXiv:1706.02690, section 4.3 (FPR at 95 % TPR).
    """
    if not len(inside) or not len(outside):
        raise DataError(f"detection needs known and unknown windows, got {len(inside)} and {len(outside)}")
    unknown = np.repeat([0, 1], [len(inside), len(outside)])
    scores = np.concatenate((inside, outside)).astype(np.float64)
    threshold = np.quantile(inside.astype(np.float64), _TRUE_POSITIVE_RATE)
    return Detection(
        auroc=float(roc_auc_score(unknown, scores)),
        aupr_in=float(average_precision_score(1 - unknown, -scores)),
        aupr_out=float(average_precision_score(unknown, scores)),
        fpr95=float((outside <= threshold).mean()),
    )


def unknown_windows(run: Run, prepared: Prepared) -> tuple[UnknownWindows, ...]:
    """The sets on which a run's scores are judged.

    Args:
        run: which one.
        prepared: its data set, with all activities.

    Returns:
        The held-out domain's known activities against source validation ("unseen person", "unseen position", ...); and,
        where activities were left out, these against the known ones, both of the held-out domain ("unseen activity").

    Raises:
        DataError, NotFoundError: as ``windows_of_run``.
    """
    known = scenario_of_run(run, prepared).target
    validation = windows_of_run(run, prepared).x_validation
    domain = UnknownWindows(f"unseen {run.scenario.removeprefix('cross-')}", validation, known.x)
    names = prepared.dataset.label_names
    if len(names) == len(run.labels):
        return (domain,)
    everything = build_scenario(run.scenario, prepared, run.target, run.scenario_seed).target
    unknown = np.isin(everything.y, [k for k, name in enumerate(names) if name not in run.labels])
    return domain, UnknownWindows("unseen activity", known.x, everything.x[unknown])


def compare_scores(
    model: Classifier,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    sets: Sequence[UnknownWindows],
    *,
    rank: int = DEFAULT_RANK,
) -> dict[str, dict[OodMethod, Detection]]:
    """Every score on every set.

    Args:
        model: trained.
        x: (n, C, T) raw source training windows, to fit the scores.
        y: (n,) their classes.
        sets: windows to tell apart.
        rank: of the covariance, see :mod:`wearfleet_cloud.export.ood_score`.

    Returns:
        Set name -> score -> how well.
    """
    found: dict[str, dict[OodMethod, Detection]] = {one.name: {} for one in sets}
    for method in OOD_METHODS:
        scored = scored_classifier(model, fit_ood(model, x, y, x, method=method, rank=rank))
        for one in sets:
            known, new = (outputs_of(scored, part)["ood_score"] for part in (one.inside, one.outside))
            found[one.name][method] = detection(known, new)
    return found
