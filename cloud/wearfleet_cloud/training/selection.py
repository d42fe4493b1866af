"""Which step of a run is kept: the one with the best source-validation accuracy."""

from dataclasses import dataclass
from statistics import fmean
from typing import Final

from wearfleet_protos.errors import ConfigError

__all__ = ["SOURCE_VALIDATION", "Best", "mean_over_domains", "select"]

SOURCE_VALIDATION: Final = "source-validation"
"""Name of the rule in results: target labels play no part in it."""


@dataclass(frozen=True, slots=True)
class Best:
    """The kept step and its source-validation accuracy."""

    step: int
    accuracy: float


def mean_over_domains(accuracies: list[float]) -> float:
    """Unweighted mean of the validation accuracies of the source domains.

    Raises:
        ConfigError: no domain.
    """
    if not accuracies:
        raise ConfigError("selection needs the validation accuracy of at least one source domain, got none")
    return fmean(accuracies)


def select(best: Best | None, step: int, accuracy: float) -> Best:
    """Keep the earlier step unless the new one is strictly better (a tie keeps the earlier one).

    Args:
        best: kept so far, None before the first evaluation.
        step: that was just evaluated.
        accuracy: its mean source-validation accuracy.

    Returns:
        What to keep from now on.

    Source: specs/ood.md 1.7.
    """
    return Best(step, accuracy) if best is None or accuracy > best.accuracy else best
