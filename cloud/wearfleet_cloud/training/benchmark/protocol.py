"""From the scores of single runs to the numbers of a table: choose a configuration, then average over seeds.

Source: specs/ood.md 1.8 and P25: the score of a configuration is its mean over the seeds; for every target on its own
the configuration with the strictly largest score is chosen; reported is its accuracy on the target, mean and population
deviation over the seeds. The overall number is the mean over the targets seed by seed, then mean and deviation of that.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

__all__ = ["Cell", "Chosen", "Spread", "Trial", "choose", "overall", "spread"]

Cell = tuple[str, str]
"""(method, target)."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run as one selection rule sees it.

    Args:
        method: what was run.
        target: held-out domain.
        configuration: number of the hyper-parameter setting.
        seed: of the run.
        score: what the rule compares configurations by.
        accuracy: on the target, at the step that the rule kept.
    """

    method: str
    target: str
    configuration: int
    seed: int
    score: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """The configuration that was chosen for a method and target, and its accuracy by seed."""

    configuration: int
    by_seed: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and population standard deviation."""

    mean: float
    deviation: float


def choose(trials: Iterable[Trial], seeds: Sequence[int]) -> dict[Cell, Chosen]:
    """The configuration of every method and target; of equal ones the first.

    Args:
        trials: of one data set, scenario and backbone, under one rule.
        seeds: a configuration counts only when it has all of them.

    Returns:
        By (method, target); what has no complete configuration is missing.
    """
    groups: dict[Cell, dict[int, dict[int, Trial]]] = defaultdict(lambda: defaultdict(dict))
    for trial in trials:
        groups[trial.method, trial.target][trial.configuration][trial.seed] = trial
    chosen: dict[Cell, Chosen] = {}
    for cell, configurations in groups.items():
        best: float | None = None
        for number in sorted(configurations):
            by_seed = configurations[number]
            if not all(seed in by_seed for seed in seeds):
                continue
            score = fmean(by_seed[seed].score for seed in seeds)
            if best is None or score > best:
                best = score
                chosen[cell] = Chosen(number, {seed: by_seed[seed].accuracy for seed in seeds})
    return chosen


def spread(values: Iterable[float]) -> Spread:
    """Of at least one value."""
    known = list(values)
    return Spread(fmean(known), pstdev(known))


def overall(chosen: Mapping[Cell, Chosen], method: str, targets: Sequence[str]) -> Spread | None:
    """Mean over the targets for each seed, then the spread over the seeds; None when a target is missing."""
    own = [chosen.get((method, target)) for target in targets]
    found = [one for one in own if one is not None]
    if len(found) < len(own) or not found:
        return None
    return spread(fmean(one.by_seed[seed] for one in found) for seed in found[0].by_seed)
