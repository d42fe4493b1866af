"""Robust rules one number at a time, in Python floats, straight from the papers' lines; slow and obvious."""

import itertools
import math

Numbers = list[float]
Rows = list[Numbers]


def mean(rows: Rows) -> Numbers:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def middle(values: Numbers) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def lower_middle(values: Numbers) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def median(rows: Rows) -> Numbers:
    return [middle(list(column)) for column in zip(*rows, strict=True)]


def trimmed_mean(rows: Rows, trim: float) -> Numbers:
    cut = math.floor(trim * len(rows))
    kept = [sorted(column)[cut : len(rows) - cut] for column in zip(*rows, strict=True)]
    return [sum(column) / len(column) for column in kept]


def distance(a: Numbers, b: Numbers) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def krum_score(rows: Rows, among: list[int], i: int, f: int) -> float:
    others = sorted(distance(rows[i], rows[j]) ** 2 for j in among if j != i)
    return sum(others[: max(1, len(among) - f - 2)])


def krum(rows: Rows, f: int) -> Numbers:
    return multi_krum(rows, f, 1)


def multi_krum(rows: Rows, f: int, k: int) -> Numbers:
    everyone = list(range(len(rows)))
    best = sorted(everyone, key=lambda i: (krum_score(rows, everyone, i, f), i))[:k]
    return mean([rows[i] for i in best])


def bulyan(rows: Rows, f: int) -> Numbers:
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        best = min(left, key=lambda i: (krum_score(rows, left, i, f), i))
        left.remove(best)
        chosen.append(best)
    result = []
    for column in zip(*(rows[i] for i in chosen), strict=True):
        centre = middle(list(column))
        near = sorted(column, key=lambda x: (abs(x - centre), x))[: len(chosen) - 2 * f]
        result.append(sum(near) / len(near))
    return result


def bulyan_all_nearest(rows: Rows, kept: int) -> Numbers:
    """Of every set of ``kept`` values the mean of the one whose farthest value is nearest the median."""
    result = []
    for column in zip(*rows, strict=True):
        centre = middle(list(column))
        sets = itertools.combinations(sorted(column), kept)
        best = min(sets, key=lambda values: sum(abs(x - centre) for x in values))
        result.append(sum(best) / kept)
    return result


def geometric_median(rows: Rows) -> Numbers:
    point = median(rows)
    for _ in range(8):
        weights = [1 / max(distance(row, point), 1e-6) for row in rows]
        point = [
            sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights)
            for column in zip(*rows, strict=True)
        ]
    return point


def norm_bound(rows: Rows, bound: float) -> Numbers:
    norms = [math.sqrt(sum(x * x for x in row)) for row in rows]
    limit = bound or lower_middle(norms)
    return mean([[x * min(1.0, limit / n) for x in row] for row, n in zip(rows, norms, strict=True)])


def centred_clipping(rows: Rows, centre: Numbers, bound: float) -> Numbers:
    for _ in range(3):
        away = [distance(row, centre) for row in rows]
        limit = bound or lower_middle(away)
        pulled = [
            [(x - c) * min(1.0, limit / d) for x, c in zip(row, centre, strict=True)]
            for row, d in zip(rows, away, strict=True)
        ]
        centre = [c + p for c, p in zip(centre, mean(pulled), strict=True)]
    return centre
