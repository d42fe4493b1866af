"""The robust rules over updates as rows of a matrix; the arithmetic over all rows is that of ``kernels.robust``.

Beside the matrix each rule needs a few vectors of its width, a slice of it in float64 (a MiB of the matrix), and for
Krum all pairs of clients. Every rule weighs clients equally: the number of windows is what a client says.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from wearfleet_cloud.federated.robust.options import selected_of
from wearfleet_cloud.kernels.robust import (
    clip_factors,
    coordinate_median,
    squared_distances,
    squared_norms,
    trimmed_mean,
    weighted_mean,
)

__all__ = [
    "Combined",
    "bulyan",
    "centred_clipping",
    "clipped_mean",
    "distances_from",
    "geometric_median",
    "krum",
    "krum_scores",
    "median",
    "trimmed",
]

_SLICE_BYTES: Final = 1 << 20
_WEISZFELD_STEPS: Final = 8
_SMOOTHING: Final = 1e-6
_CLIPPINGS: Final = 3


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """What a rule made.

    Args:
        value: (P,) the aggregate.
        shares: (K,) how much of each row is in it: 0 left out, below 1 clipped, else 1.
        scores: (K,) of the rule; None when it has none.
    """

    value: Tensor
    shares: Tensor
    scores: Tensor | None = None


def median(rows: Tensor) -> Combined:
    """Coordinate-wise median; of an even number the mean of the middle two.

    Source: Yin et al. 2018, arXiv:1803.01498, algorithm 1, option I.
    """
    return Combined(coordinate_median(rows), _ones(rows))


def trimmed(rows: Tensor, trim: float) -> Combined:
    """Coordinate-wise mean without the floor(trim K) smallest and largest values.

    Source: Yin et al. 2018, arXiv:1803.01498, algorithm 1, option II.
    """
    return Combined(trimmed_mean(rows, int(trim * len(rows))), _ones(rows))


def krum(rows: Tensor, attackers: int, selected: int) -> Combined:
    """The mean of the ``selected`` updates with the lowest scores; Krum takes one, Multi-Krum more.

    Args:
        rows: (K, P), K >= 2 f + 3.
        attackers: f.
        selected: k; 0 for Multi-Krum's default (``selected_of``).

    Source: Blanchard et al. 2017, arXiv:1703.02757, sections 4 and 5.
    """
    scores = krum_scores(squared_distances(rows), attackers)
    chosen = scores.argsort(stable=True)[: selected_of(len(rows), attackers, selected)]
    shares = torch.zeros_like(scores).index_fill(0, chosen, 1.0)
    value = rows[int(chosen[0])].clone() if len(chosen) == 1 else weighted_mean(rows, shares)
    return Combined(value, shares, scores)


def krum_scores(distances: Tensor, attackers: int) -> Tensor:
    """Sum of the K - f - 2 smallest squared distances to others (at least one); oneself is left out by index.

    Args:
        distances: (K, K) squared.
        attackers: f.
    """
    count = len(distances)
    others = distances + torch.diag(torch.full((count,), torch.inf, dtype=distances.dtype))
    return others.sort(dim=1).values[:, : max(1, count - attackers - 2)].sum(dim=1)


def bulyan(rows: Tensor, attackers: int) -> Combined:
    """Choose K - 2 f updates by repeated Krum, then per coordinate average the K - 4 f values nearest the median.

    Args:
        rows: (K, P), K >= 4 f + 3.
        attackers: f.

    Source: El Mhamdi et al. 2018, arXiv:1802.07927, section 4.
    Differs: when so few are left that Krum has no neighbour to count, the nearest one counts.
    """
    distances = squared_distances(rows)
    first = krum_scores(distances, attackers)
    left = list(range(len(rows)))
    for _ in range(len(rows) - 2 * attackers):
        at = torch.tensor(left)
        left.pop(int(krum_scores(distances[at][:, at], attackers).argmin()))
    chosen = torch.tensor([row for row in range(len(rows)) if row not in set(left)])
    kept = len(rows) - 4 * attackers
    value = _by_slices(rows, lambda columns: _nearest_mean(columns[chosen], kept))
    return Combined(value, torch.zeros_like(first).index_fill(0, chosen, 1.0), first)


def geometric_median(rows: Tensor) -> Combined:
    """The point whose distances to all updates add up to the least: 8 steps of Weiszfeld, from the coordinate median.

    Source: Pillutla et al. 2022, arXiv:1912.13445 (RFA), algorithm 2, smoothing 1e-6.
    Differs: it begins at the coordinate median, which no minority can carry off; clients weigh the same.
    """
    value = coordinate_median(rows)
    for _ in range(_WEISZFELD_STEPS):
        weights = 1.0 / distances_from(rows, value).clamp(min=_SMOOTHING)
        value = weighted_mean(rows, weights)
    return Combined(value, _ones(rows), weights / weights.max())


def clipped_mean(rows: Tensor, bound: float) -> Combined:
    """The mean of updates brought to a norm of at most ``bound``; 0 for the median norm of these updates.

    Source: Sun et al. 2019, arXiv:1911.07963, section 4 (norm thresholding).
    """
    limit = bound or float(squared_norms(rows).sqrt().median())
    if limit == 0.0:  # more than half are zeros
        return Combined(torch.zeros_like(rows[0]), _ones(rows))
    factors = clip_factors(rows, limit)
    return Combined(weighted_mean(rows, _ones(rows), factors=factors), factors, factors)


def centred_clipping(rows: Tensor, centre: Tensor, radius: float) -> Combined:
    """Three times v <- v + mean((u_i - v) min(1, radius / |u_i - v|)).

    Args:
        rows: (K, P).
        centre: (P,) first v: the aggregate of the round before.
        radius: farthest a client may pull; 0 for the median distance from v.

    Source: Karimireddy et al. 2021, arXiv:2012.10333, equation 3.
    Differs: the server's last aggregate is the centre, since clients send no momentum; the radius follows the
    distances unless it is given.
    """
    value, factors = centre, _ones(rows)
    for _ in range(_CLIPPINGS):
        distances = distances_from(rows, value)
        limit = radius or float(distances.median())
        factors = (limit / distances.clamp(min=1e-300)).clamp(max=1.0)
        pulled = weighted_mean(rows, _ones(rows), factors=factors)
        value = pulled.double() + (1.0 - factors.mean()) * value.double()
    return Combined(value, factors, factors)


def distances_from(rows: Tensor, point: Tensor) -> Tensor:
    """|u_i - point| of every row, in float64: (K,)."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    for begin, columns in _slices(rows):
        total += squared_norms(columns.double() - point[begin : begin + columns.shape[1]].double())
    return total.sqrt()


def _nearest_mean(columns: Tensor, kept: int) -> Tensor:
    """Per column the mean of the ``kept`` values nearest its median; of two as near the smaller one."""
    ordered = columns.double().sort(dim=0).values
    middle = 0.5 * (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2])
    nearest = (ordered - middle).abs().argsort(dim=0, stable=True)[:kept]
    return ordered.gather(0, nearest).mean(dim=0)


def _by_slices(rows: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    value = torch.empty(rows.shape[1], dtype=torch.float64)
    for begin, columns in _slices(rows):
        value[begin : begin + columns.shape[1]] = part(columns)
    return value


def _slices(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    width = max(1, _SLICE_BYTES // (len(rows) * rows.element_size()))
    for begin in range(0, rows.shape[1], width):
        yield begin, rows[:, begin : begin + width]


def _ones(rows: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.float64)
