"""The weighted average of updates: streaming, in float64, and the same whatever the order of arrival.

Updates are loaded one at a time in the order of their clients' names, so memory is a few models however many
clients there are, and the result is the same bit for bit. Means are updated incrementally
(m <- m + (x - m) w / W, West 1979), so equal updates return themselves exactly.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError, ShapeError
from wearfleet_protos.plan import UploadSpec
from wearfleet_protos.tensors import TensorRole, TensorSpec, check_finite, check_tensors

__all__ = ["Arrays", "Averaged", "Averaging", "Contribution", "average", "check_update"]

Arrays = Mapping[str, NDArray[np.generic]]

_BLOCK: Final = 32_768
"""Numbers folded at a time: 256 KiB of float64."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's part of a round.

    Args:
        client: identity; a client counts once.
        num_examples: windows it trained on, > 0.
        load: gives the uploaded tensors; called once, when it is this client's turn.
    """

    client: str
    num_examples: int
    load: Callable[[], Arrays]


@dataclass(frozen=True, slots=True)
class Averaging:
    """How updates are weighted.

    Args:
        weighting: ``examples`` (FedAvg's own: by number of windows) or ``uniform``.
        statistics: ``moments`` pools means and variances of normalisation as moments of the mixture;
            ``naive`` averages the variances too (biased low; for parity with published numbers).
    """

    weighting: Literal["examples", "uniform"] = "examples"
    statistics: Literal["moments", "naive"] = "moments"


@dataclass(frozen=True, slots=True)
class Averaged:
    """New global tensors and who made them.

    Args:
        tensors: every tensor of the current ones, changed where updates were uploaded.
        clients: in the order of folding.
        num_examples: of all clients together.
    """

    tensors: dict[str, NDArray[np.generic]]
    clients: tuple[str, ...]
    num_examples: int


def check_update(update: Arrays, specs: Iterable[TensorSpec], *, client: str) -> None:
    """Refuse an update that cannot be averaged.

    Args:
        update: what a client sent.
        specs: ``Plan.upload_specs()``.
        client: named in the error.

    Raises:
        AggregationError: a tensor is missing, unexpected, of another shape or type, or not finite.
    """
    try:
        check_tensors(update, specs)
        check_finite(update)
    except ShapeError as error:
        raise AggregationError(f"update of client {client} refused: {error}") from error


def average(
    specs: Sequence[TensorSpec],
    upload: UploadSpec,
    current: Arrays,
    contributions: Iterable[Contribution],
    averaging: Averaging = Averaging(),
) -> Averaged:
    """Fold the updates of a round into the global tensors.

    x <- sum_i w_i y_i, with y_i the client's tensors (x + delta_i for differences). Statistics of normalisation come in
    pairs, mean then variance, in the order of ``specs``; with moments v = sum_i w_i (v_i + (mu_i - mu)^2). Counters
    take the largest. A server optimiser never touches either.

    Args:
        specs: the plan's tensors in their order (``Plan.tensors``).
        upload: roles, groups and form of the updates.
        current: global tensors that the clients started from.
        contributions: any order.
        averaging: weights.

    Returns:
        The new global tensors, in the types of the current ones.

    Raises:
        AggregationError: no contributions, a client twice, a count below one, or an update that does not fit.

    Source:
        McMahan et al. 2017, arXiv:1602.05629, algorithm 1; pooled moments: specs/federated.md 0.4.
    """
    ordered = _check_contributions(contributions)
    wanted = tuple(s for s in specs if s.role in upload.roles and s.group in upload.groups)
    _check_current(current, wanted)
    pairs = _statistic_pairs(wanted)
    pooled = pairs if averaging.statistics == "moments" else {}
    means = {spec.name: _start(spec) for spec in wanted}
    weight_before = 0.0
    for contribution in ordered:
        update = contribution.load()
        check_update(update, wanted, client=contribution.client)
        _check_variances(contribution.client, update, current if upload.form == "delta" else {}, pairs)
        weight = float(contribution.num_examples) if averaging.weighting == "examples" else 1.0
        weight_before += weight
        _fold(wanted, pooled, means, update, weight / weight_before)
    return Averaged(
        {name: _finish(name, array, means, upload) for name, array in current.items()},
        tuple(c.client for c in ordered),
        sum(c.num_examples for c in ordered),
    )


def _check_contributions(contributions: Iterable[Contribution]) -> tuple[Contribution, ...]:
    ordered = tuple(sorted(contributions, key=lambda c: c.client))
    if not ordered:
        raise AggregationError("no updates to average; the round must be skipped and the old model kept")
    for before, after in pairwise(ordered):
        if before.client == after.client:
            raise AggregationError(f"client {after.client} contributes twice to one round")
    for contribution in ordered:
        if contribution.num_examples < 1:
            raise AggregationError(
                f"client {contribution.client} claims {contribution.num_examples} training windows; at least 1 expected"
            )
    return ordered


def _check_current(current: Arrays, wanted: Sequence[TensorSpec]) -> None:
    try:
        check_tensors({s.name: current[s.name] for s in wanted if s.name in current}, wanted)
    except ShapeError as error:
        raise AggregationError(f"current global tensors are not those of the plan: {error}") from error


def _statistic_pairs(specs: Sequence[TensorSpec]) -> dict[str, str]:
    """Name of each variance -> name of its mean."""
    statistics = [s for s in specs if s.role == TensorRole.NORM_STAT]
    means, variances = statistics[::2], statistics[1::2]
    if len(means) != len(variances) or any(m.shape != v.shape for m, v in zip(means, variances, strict=True)):
        raise AggregationError(
            "normalisation statistics must be declared in pairs, mean then variance, of one shape; got "
            + ", ".join(f"{s.name} {s.shape}" for s in statistics[:6])
        )
    return {variance.name: mean.name for mean, variance in zip(means, variances, strict=True)}


def _check_variances(client: str, update: Arrays, start: Arrays, pairs: Mapping[str, str]) -> None:
    """A negative variance would make every later evaluation NaN; rounding may leave one of -1e-6."""
    for name in pairs:
        values: NDArray[Any] = np.asarray(update[name], dtype=np.float64)
        if name in start:
            values = values + np.asarray(start[name], dtype=np.float64)
        if values.size and values.min() < -1e-6:
            raise AggregationError(
                f"update of client {client} refused: variance {name} is negative ({values.min():.3g})"
            )


def _start(spec: TensorSpec) -> NDArray[Any]:
    if spec.role == TensorRole.COUNTER:
        return np.full(spec.shape, np.iinfo(spec.dtype).min, dtype=spec.dtype)
    return np.zeros(spec.shape, dtype=np.float64)


def _fold(
    specs: Sequence[TensorSpec],
    pairs: Mapping[str, str],
    means: dict[str, NDArray[Any]],
    update: Mapping[str, NDArray[Any]],
    share: float,
) -> None:
    """Take one client in, with ``share`` = its weight / weight so far; changes ``means``.

    Differences are averaged as they are: the spread of means does not depend on where they are counted from.
    """
    spread = {variance: update[mean] - means[mean] for variance, mean in pairs.items()}
    for spec in specs:
        if spec.role == TensorRole.COUNTER:
            means[spec.name] = np.maximum(means[spec.name], update[spec.name])
            continue
        _move(means[spec.name], update[spec.name], share)
        if spec.name in spread:
            means[spec.name] += share * (1.0 - share) * spread[spec.name] ** 2


def _move(mean: NDArray[Any], towards: NDArray[Any], share: float) -> None:
    """Mean += (towards - mean) * share, in place and in blocks that stay in the cache."""
    flat, other = mean.reshape(-1), towards.reshape(-1)
    for begin in range(0, flat.size, _BLOCK):
        block = flat[begin : begin + _BLOCK]
        difference = np.subtract(other[begin : begin + _BLOCK], block, dtype=np.float64)
        difference *= share
        block += difference


def _finish(
    name: str, current: NDArray[Any], means: Mapping[str, NDArray[Any]], upload: UploadSpec
) -> NDArray[Any]:
    if name not in means:
        return current
    return np.asarray(current + means[name] if upload.form == "delta" else means[name]).astype(current.dtype)
