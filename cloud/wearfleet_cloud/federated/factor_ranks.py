"""Clients of unequal ranks on the server: distances over the columns that two have, mixtures row by row.

The network has R columns in every factor B and R rows in every A; client i has the first r_i of them, 1 <= r_i <= R.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from wearfleet_cloud.federated.aggregate import Contribution, Mean
from wearfleet_cloud.federated.client_models import mixed

__all__ = ["RANK", "column_distances", "mean_of_rows", "mixed_rows", "rank_fault"]

Array = NDArray[Any]

RANK: Final = "rank"
"""Name of the number that a client sends: its rank."""


def rank_fault(claimed: float, highest: int) -> str:
    """Why a number is no rank of a network of R = ``highest``; empty when it is."""
    if claimed == round(claimed) and 1 <= claimed <= highest:
        return ""
    return f"its rank is {claimed:g}, expected is a whole number of 1 to {highest}"


def column_distances(layers: Sequence[Array], ranks: Array) -> Array:
    """Distances between clients over the columns that both have: c = min(r_i, r_j) of R.

    d_ij = 1/L sum_l sqrt(R / c sum_{k < c} ||s_ik^l - s_jk^l||^2). The factor R / c makes pairs with few common columns
    no nearer than others: where columns differ alike, d_ij does not depend on c. Of equal ranks R it is
    1/L sum_l ||B_i^l - B_j^l||_F.

    Args:
        layers: L arrays (N, R, numbers), float64: a sketch s of each column of B.
        ranks: (N,) int64, 1 to R.

    Returns:
        (N, N) float64, symmetric to the bit, 0 on the diagonal. Memory beside it is that of one client's row.
    """
    rows = np.arange(len(ranks))
    distances = np.zeros((len(ranks), len(ranks)))
    for client, rank in enumerate(ranks):
        common = np.minimum(ranks, rank)
        for sketches in layers:
            apart = ((sketches - sketches[client]) ** 2).sum(axis=2).cumsum(axis=1)  # (N, R)
            scale = sketches.shape[1] / common
            distances[client] += np.sqrt(scale * apart[rows, common - 1])
    return distances / len(layers)


def mixed_rows(weights: Array, last: Mapping[str, Array], ranks: Array) -> dict[str, Array]:
    """Mixtures in which row k counts of the clients that have it: theta_ik = sum_{j: r_j > k} v_ij theta_jk.

    v are the weights w over these clients, divided by their sum; a row that nobody with a weight has stays client i's
    own. Rows that all have are mixed as by ``mixed``.

    Args:
        weights: (N, N) float64, rows sum to 1.
        last: tensor -> (N, R, ...).
        ranks: (N,) int64, 1 to R.

    Returns:
        The arrays of ``last`` mixed, in their types.
    """
    results = mixed(weights, last)
    for begin, end, having in _unequal(ranks, last):
        part = mixed(_over(weights, having), {name: array[:, begin:end] for name, array in last.items()})
        for name, array in part.items():
            results[name][:, begin:end] = array
    return results


def mean_of_rows(
    combine: Callable[[Sequence[Contribution]], Mean], parts: Sequence[Contribution], ranks: Array
) -> Mean:
    """The mean of a round in which row k counts of the clients that have it; 0 where none of them does.

    Args:
        combine: makes the mean of some contributions of differences (R, ...); it may load them again.
        parts: contributions of n clients.
        ranks: (n,) int64 theirs, 1 to R.
    """
    whole = combine(parts)
    values = {name: array.copy() for name, array in whole.values.items()}
    for begin, end, having in _unequal(ranks, {name: array[None] for name, array in values.items()}):
        own = [part for part, has in zip(parts, having, strict=True) if has]
        rows = combine(own).values if own else {}
        for name, array in values.items():
            array[begin:end] = rows[name][begin:end] if own else 0.0
    return replace(whole, values=values)


def _unequal(ranks: Array, tensors: Mapping[str, Array]) -> list[tuple[int, int, Array]]:
    """Rows [begin, end) that the same clients have, and (N,) which; without those that all have."""
    highest = next(iter(tensors.values())).shape[1]
    bounds = sorted({*ranks.tolist(), highest})
    return [(begin, end, ranks > begin) for begin, end in pairwise(bounds)]


def _over(weights: Array, having: Array) -> Array:
    """The weights over some clients; who has none there keeps its own."""
    shares = weights * having
    total = shares.sum(axis=1, keepdims=True)
    alone = total == 0.0
    return np.where(alone, np.eye(len(weights)), shares / np.where(alone, 1.0, total))
