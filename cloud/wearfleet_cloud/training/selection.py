"""Which step of a run, and which of several configurations, is kept: three rules, never mixed in one table.

Source: specs/ood.md 1.8 (the benchmark's two protocols; its oracle, too, chooses the step by validation, P24) and
3.8 (Mixup-guided selection, arXiv:2209.00652).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal

from wearfleet_protos.errors import ConfigError

__all__ = [
    "RULES",
    "SOURCE_VALIDATION",
    "Best",
    "Rule",
    "Scores",
    "mean_over_domains",
    "select",
    "select_all",
]

Measure = Literal["source_validation_accuracy", "mixup_validation_accuracy", "target_accuracy"]
SOURCE_VALIDATION: Final = "source-validation"
"""Name of the default rule: target labels play no part in it."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What one evaluation says of a model.

    Args:
        source_validation_accuracy: unweighted mean over the held-out windows of each source domain.
        mixup_validation_accuracy: soft-label accuracy on fixed mixtures of held-out windows of different domains.
        target_accuracy: on the unseen domain.
        target_macro_f1: on the unseen domain.
    """

    source_validation_accuracy: float
    mixup_validation_accuracy: float
    target_accuracy: float
    target_macro_f1: float

    def of(self, measure: Measure) -> float:
        """One of them by name."""
        return float(getattr(self, measure))


@dataclass(frozen=True, slots=True)
class Rule:
    """What chooses the step within a run, and what chooses among configurations by its mean over seeds."""

    step_by: Measure
    configuration_by: Measure


RULES: Final[Mapping[str, Rule]] = {
    SOURCE_VALIDATION: Rule("source_validation_accuracy", "source_validation_accuracy"),
    "mixup-validation": Rule("mixup_validation_accuracy", "mixup_validation_accuracy"),
    "oracle": Rule("source_validation_accuracy", "target_accuracy"),
}


@dataclass(frozen=True, slots=True)
class Best:
    """The kept step and the scores it had."""

    step: int
    scores: Scores


def mean_over_domains(accuracies: list[float]) -> float:
    """Unweighted mean of the validation accuracies of the source domains.

    Raises:
        ConfigError: no domain.
    """
    if not accuracies:
        raise ConfigError("selection needs the validation accuracy of at least one source domain, got none")
    return fmean(accuracies)


def select(rule: str, best: Best | None, step: int, scores: Scores) -> Best:
    """Keep the earlier step unless the new one is strictly better (a tie keeps the earlier one).

    Args:
        rule: a key of ``RULES``.
        best: of the evaluations before, None at the first.
        step: of the new evaluation.
        scores: of the new evaluation.
    """
    measure = RULES[rule].step_by
    if best is None or scores.of(measure) > best.scores.of(measure):
        return Best(step, scores)
    return best


def select_all(best: Mapping[str, Best] | None, step: int, scores: Scores) -> dict[str, Best]:
    """``select`` by every rule; arguments as there, with the best of each rule by name."""
    return {rule: select(rule, best[rule] if best else None, step, scores) for rule in RULES}
