"""What an operator chooses of a robust rule, what it is checked for, and how many updates a rule needs."""

import math
from collections.abc import Sequence
from typing import Final

from wearfleet_protos.errors import AggregationError, ConfigError

from wearfleet_cloud.federated.robust.evidence import Judgement

__all__ = ["RULES", "TooFewUpdatesError", "check_bound", "check_options", "selected_of"]

RULES: Final = (
    "mean",
    "krum",
    "multi-krum",
    "trimmed-mean",
    "median",
    "bulyan",
    "geometric-median",
    "norm-bound",
    "centred-clipping",
)
_COUNTING: Final = ("krum", "multi-krum", "bulyan")
"""Rules whose arithmetic uses the number of attackers."""

_DEFAULT_TRIM: Final = 0.2


class TooFewUpdatesError(AggregationError):
    """A rule's guarantee needs more updates than passed the first checks: the round is skipped, the model stays.

    Args:
        message: what was needed and what came.
        refused: who did not pass, and why.
    """

    def __init__(self, message: str, refused: Sequence[Judgement] = ()) -> None:
        super().__init__(message)
        self.refused = tuple(refused)


def check_options(
    rule: str, *, attackers: int, trim: float, selected: int, bound: float, bucket: int
) -> None:
    """Refuse options that are out of range, or that the rule would not look at.

    Raises:
        ConfigError: says which one and what to do.
    """
    if rule not in RULES:
        raise ConfigError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    if attackers < 0 or not 0.0 <= trim < 0.5 or selected < 0 or not 0.0 <= bound < math.inf or bucket < 1:
        raise ConfigError(
            "attackers, selected and bound must be at least 0, trim at least 0 and below 0.5, bucket at least 1; got "
            f"{attackers}, {selected}, {bound}, {trim} and {bucket}"
        )
    unused = {
        "attackers": attackers > 0 and rule == "mean",
        "trim": trim != _DEFAULT_TRIM and rule != "trimmed-mean",
        "selected": selected > 0 and rule != "multi-krum",
        "bound": bound > 0.0 and rule not in ("norm-bound", "centred-clipping"),
        "bucket": bucket > 1 and rule == "mean",
    }
    for name, given in unused.items():
        if given:
            raise ConfigError(f"rule {rule} does not use {name}; leave it out or choose another rule")
    if rule in _COUNTING and attackers < 1:
        raise ConfigError(
            f"rule {rule} must know how many attackers it has to bear; set attackers to at least 1"
        )


def check_bound(
    rule: str, count: int, *, attackers: int, trim: float, selected: int, refused: Sequence[Judgement] = ()
) -> None:
    """Refuse to apply a rule to fewer updates than its guarantee needs; the number of attackers is never lowered.

    Args:
        rule: not ``mean``.
        count: m, updates (or buckets of them) that passed the first checks.
        attackers: f.
        trim: share that is cut at each end.
        selected: k of Multi-Krum; 0 for its default.
        refused: who did not pass the first checks; goes into the error.

    Raises:
        TooFewUpdatesError: the round must be skipped and the old model kept.
    """
    least = {"krum": 2, "multi-krum": 2, "bulyan": 4}
    needed = least[rule] * attackers + 3 if rule in least else 2 * attackers + 1
    if count < needed:
        raise TooFewUpdatesError(
            f"rule {rule} with {attackers} attackers needs at least {needed} updates, {count} are left; the round is "
            "skipped (raise cohort_size, or lower attackers or bucket in a new run)",
            refused,
        )
    if rule == "trimmed-mean" and math.floor(trim * count) < attackers:
        raise TooFewUpdatesError(
            f"trimmed-mean cuts {math.floor(trim * count)} of {count} updates at each end, fewer than {attackers} "
            f"attackers; the round is skipped (trim must be at least {attackers / count:.3f})",
            refused,
        )
    if rule == "multi-krum" and selected > count - attackers:
        raise TooFewUpdatesError(
            f"multi-krum cannot take {selected} of {count} updates when {attackers} may be bad; the round is skipped",
            refused,
        )


def selected_of(count: int, attackers: int, selected: int) -> int:
    """How many updates Multi-Krum averages: as chosen, else the most that is proven, k < m - 2 f - 2, at least 1."""
    return selected or max(1, count - 2 * attackers - 3)
