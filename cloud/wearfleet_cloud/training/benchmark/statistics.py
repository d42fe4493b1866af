"""Is one method better than another over many data sets and targets: ranks, Friedman's test, Nemenyi's distance.

Source: Demsar 2006, "Statistical comparisons of classifiers over multiple data sets", JMLR 7, sections 3.2.2 and 3.2.4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy.stats import friedmanchisquare, rankdata, studentized_range  # type: ignore[import-untyped]

from wearfleet_cloud.training.benchmark.protocol import choose
from wearfleet_cloud.training.benchmark.rows import Row
from wearfleet_cloud.training.benchmark.tables import settings_of, trials_of

__all__ = ["Comparison", "cliques", "compare", "critical_difference", "friedman_p", "ranks"]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Methods on the same blocks.

    Args:
        methods: M names.
        blocks: N names, one a data set, scenario, backbone and target.
        accuracy: (N, M) mean over the seeds.
        missing: methods that lack a block and are left out.
    """

    methods: tuple[str, ...]
    blocks: tuple[str, ...]
    accuracy: NDArray[np.float64]
    missing: tuple[str, ...]


def compare(rows: Sequence[Row], rule: str) -> Comparison:
    """The accuracies of all methods on all blocks, configurations chosen by a selection rule."""
    table: dict[str, dict[str, float]] = {}
    for setting in settings_of(rows):
        chosen = choose(trials_of(rows, setting, rule), setting.seeds)
        for target, name in setting.targets:
            block = f"{setting.dataset} {setting.scenario} {setting.backbone} {name}"
            table[block] = {
                method: fmean(chosen[method, target].by_seed.values())
                for method in setting.methods
                if (method, target) in chosen
            }
    blocks = tuple(block for block, own in table.items() if own)
    every = tuple(dict.fromkeys(row["method"] for row in rows))
    methods = tuple(method for method in every if blocks and all(method in table[block] for block in blocks))
    accuracy = np.array([[table[block][method] for method in methods] for block in blocks])
    return Comparison(methods, blocks, accuracy, tuple(m for m in every if m not in methods))


def ranks(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of every method on every block (N, M): 1 is the best; equal ones share the mean of their ranks."""
    found: NDArray[np.float64] = rankdata(-accuracy, axis=1)
    return found


def friedman_p(accuracy: NDArray[np.float64]) -> float:
    """Probability of ranks that differ as much when no method is better; NaN for fewer than 3 methods or 2 blocks."""
    blocks, methods = accuracy.shape
    if methods < 3 or blocks < 2:
        return math.nan
    return float(friedmanchisquare(*accuracy.T).pvalue)


def critical_difference(methods: int, blocks: int, level: float = 0.05) -> float:
    """Mean ranks of two of M methods over N blocks that lie this far apart differ (Nemenyi)."""
    q = float(studentized_range.ppf(1.0 - level, methods, np.inf)) / math.sqrt(2.0)
    return q * math.sqrt(methods * (methods + 1) / (6.0 * blocks))


def cliques(mean_ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """Groups of methods, ascending by rank, that do not differ: first and last place of each largest group."""
    order = sorted(mean_ranks)
    found: list[tuple[int, int]] = []
    for first, rank in enumerate(order):
        last = max(place for place, other in enumerate(order) if other - rank <= difference)
        if last > first and not (found and found[-1][1] >= last):
            found.append((first, last))
    return found
