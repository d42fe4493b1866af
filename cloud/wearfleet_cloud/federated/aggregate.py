"""The weighted average of updates: streaming, in float64, and the same whatever the order of arrival.

Updates are loaded one at a time in the order of their clients' names, so memory is a few models however many
clients there are, and the result is the same bit for bit. Means are updated incrementally
(m <- m + (x - m) w / W, West 1979), so equal updates return themselves exactly. Rules that must see all updates
together are in ``robust``; only they import torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError, ConfigError, ShapeError
from wearfleet_protos.plan import UploadSpec
from wearfleet_protos.tensors import TensorRole, TensorSpec, check_finite, check_tensors

from wearfleet_cloud.federated.robust.evidence import Judgement
from wearfleet_cloud.federated.robust.options import check_options

__all__ = [
    "Arrays",
    "Averaged",
    "Averaging",
    "Contribution",
    "Mean",
    "check_current",
    "check_update",
    "check_variances",
    "moved",
    "one_each",
    "statistic_pairs",
    "uploaded",
    "weighted_mean",
]

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
        num_steps: optimiser steps it made.
        scale: factor of what it trained; statistics of normalisation and counters are taken as they are.
        staleness: versions that the global tensors have gone on since it started; 0 in synchronous rounds.
        members: the clients whose mean it is; empty for the client's own update.
    """

    client: str
    num_examples: int
    load: Callable[[], Arrays]
    num_steps: int = 0
    scale: float = 1.0
    staleness: int = 0
    members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Averaging:
    """How updates are combined.

    Args:
        weighting: ``examples`` (FedAvg's own: by number of windows) or ``uniform``; of the mean only: robust rules
            weigh clients equally.
        statistics: ``moments`` pools means and variances of normalisation as moments of the mixture;
            ``naive`` averages the variances too (biased low; for parity with published numbers). Of the mean only:
            robust rules take the median.
        rule: ``mean``, or a robust one (``robust.options.RULES``).
        attackers: f, so many bad clients the robust rule must bear; a round with too few updates for it is skipped.
        trim: of ``trimmed-mean``: share that is cut at each end of every coordinate.
        selected: of ``multi-krum``: updates it averages; 0 for m - 2 f - 3, what is proven, or 1.
        bound: of ``norm-bound``: largest norm of an update; of ``centred-clipping``: farthest it may pull; 0 for the
            median of the round.
        bucket: robust rules see means of so many randomly chosen updates; 1 for the updates themselves.
        memory: what the robust rule's last aggregation left (``Mean.memory``); no option.

    Raises:
        ConfigError: another value, or an option that the rule does not use.
    """

    weighting: str = "examples"
    statistics: str = "moments"
    rule: str = "mean"
    attackers: int = 0
    trim: float = 0.2
    selected: int = 0
    bound: float = 0.0
    bucket: int = 1
    memory: Arrays = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("weighting", self.weighting, ("examples", "uniform")),
            ("statistics", self.statistics, ("moments", "naive")),
        ):
            if value not in known:
                raise ConfigError(f"{name} must be {' or '.join(known)}, got {value!r}")
        check_options(
            self.rule,
            attackers=self.attackers,
            trim=self.trim,
            selected=self.selected,
            bound=self.bound,
            bucket=self.bucket,
        )

    @property
    def addition(self) -> str:
        """As ``composition.Addition``."""
        return "" if self.rule == "mean" else "robust"

    def combine(
        self,
        specs: Sequence[TensorSpec],
        upload: UploadSpec,
        current: Arrays,
        contributions: Iterable[Contribution],
    ) -> "Mean":
        """What ``rule`` makes of the updates of a round: :func:`weighted_mean`, or ``robust.mean.robust_mean``."""
        if self.rule == "mean":
            return weighted_mean(specs, upload, current, contributions, self)
        from wearfleet_cloud.federated.robust.mean import robust_mean  # noqa: PLC0415  a mean needs no torch

        return robust_mean(specs, upload, current, contributions, self)


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of what clients sent, or what a robust rule made of it.

    Args:
        values: float64 (counters in their own type) by name; differences where differences were sent.
        clients: in the order of folding; who was refused is not among them.
        num_examples: of all clients together.
        evidence: a robust rule's judgement of each client, by name; of a mean only who was refused.
        memory: what the robust rule keeps for its next aggregation.
    """

    values: dict[str, NDArray[Any]]
    clients: tuple[str, ...]
    num_examples: int
    evidence: tuple[Judgement, ...] = ()
    memory: Arrays = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Averaged:
    """New global tensors and who made them.

    Args:
        tensors: every tensor of the current ones, changed where updates were uploaded.
        mean: of the updates.
        state: what the strategy keeps on the server for its next round; empty when it keeps nothing.
    """

    tensors: dict[str, NDArray[np.generic]]
    mean: Mean
    state: Arrays = field(default_factory=dict)


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


def weighted_mean(
    specs: Sequence[TensorSpec],
    upload: UploadSpec,
    current: Arrays,
    contributions: Iterable[Contribution],
    averaging: Averaging = Averaging(),
) -> Mean:
    """The mean of the updates of a round.

    sum_i w_i s_i y_i, with y_i what client i sent and s_i its scale. Statistics of normalisation come in pairs, mean
    then variance, in the order of ``specs``; with moments v = sum_i w_i (v_i + (mu_i - mu)^2). Counters take the
    largest. A server optimiser never touches either. A client whose update would make a variance negative is left out:
    the service cannot see that when the update comes, and one client must not be able to end the round.

    Args:
        specs: the plan's tensors in their order (``Plan.tensors``).
        upload: roles, groups and form of the updates.
        current: global tensors that the clients started from.
        contributions: any order.
        averaging: weights.

    Raises:
        AggregationError: no contributions, a client twice, a count below one, an update that does not fit, or none
            whose variances can be used.

    Source:
        McMahan et al. 2017, arXiv:1602.05629, algorithm 1; pooled moments: specs/federated.md 0.4.
    """
    ordered = one_each(contributions)
    _check_counts(ordered)
    wanted = uploaded(specs, upload)
    check_current(current, wanted)
    pairs = statistic_pairs(wanted)
    pooled = pairs if averaging.statistics == "moments" else {}
    means = {spec.name: _start(spec) for spec in wanted}
    start = current if upload.form == "delta" else {}
    counted: list[Contribution] = []
    refused: list[Judgement] = []
    weight_before = 0.0
    for contribution in ordered:
        update = contribution.load()
        check_update(update, wanted, client=contribution.client)
        try:
            check_variances(contribution.client, update, start, pairs)
        except AggregationError as error:
            refused.append(Judgement(contribution.client, "refused", str(error), suspect=True))
            continue
        counted.append(contribution)
        weight = float(contribution.num_examples) if averaging.weighting == "examples" else 1.0
        weight_before += weight
        _fold(wanted, pooled, means, update, (weight / weight_before, contribution.scale))
    if not counted:
        raise AggregationError(refused[0].reason)
    clients = tuple(member for c in counted for member in c.members or (c.client,))
    return Mean(means, clients, sum(c.num_examples for c in counted), tuple(refused))


def moved(current: Arrays, mean: Mean, upload: UploadSpec) -> dict[str, NDArray[np.generic]]:
    """The current tensors with the mean in place of those that were uploaded (added to them, if it is of differences).

    Returns:
        Every tensor of ``current``, in its type; what was uploaded beside them is left out.
    """
    return {name: _finish(name, array, mean.values, upload) for name, array in current.items()}


def uploaded(specs: Iterable[TensorSpec], upload: UploadSpec) -> tuple[TensorSpec, ...]:
    """The tensors of an update, in the order of ``specs``."""
    return tuple(s for s in specs if s.role in upload.roles and s.group in upload.groups)


def one_each(contributions: Iterable[Contribution]) -> tuple[Contribution, ...]:
    """In the order of the clients' names.

    Raises:
        AggregationError: none, or a client twice.
    """
    ordered = tuple(sorted(contributions, key=lambda c: c.client))
    if not ordered:
        raise AggregationError("no updates to average; the round must be skipped and the old model kept")
    for before, after in pairwise(ordered):
        if before.client == after.client:
            raise AggregationError(f"client {after.client} contributes twice to one round")
    return ordered


def _check_counts(contributions: Iterable[Contribution]) -> None:
    for contribution in contributions:
        if contribution.num_examples < 1:
            raise AggregationError(
                f"client {contribution.client} claims {contribution.num_examples} training windows; at least 1 expected"
            )


def check_current(current: Arrays, wanted: Sequence[TensorSpec]) -> None:
    """Refuse global tensors that are not those of the plan; one that begins with zeros on the client has none.

    Raises:
        AggregationError: says which differs.
    """
    known = [spec for spec in wanted if spec.origin != "zeros"]
    try:
        check_tensors({s.name: current[s.name] for s in known if s.name in current}, known)
    except ShapeError as error:
        raise AggregationError(f"current global tensors are not those of the plan: {error}") from error


def statistic_pairs(specs: Sequence[TensorSpec]) -> dict[str, str]:
    """Name of each variance of normalisation -> name of its mean.

    Raises:
        AggregationError: they are not declared in pairs.
    """
    statistics = [s for s in specs if s.role == TensorRole.NORM_STAT]
    means, variances = statistics[::2], statistics[1::2]
    if len(means) != len(variances) or any(m.shape != v.shape for m, v in zip(means, variances, strict=True)):
        raise AggregationError(
            "normalisation statistics must be declared in pairs, mean then variance, of one shape; got "
            + ", ".join(f"{s.name} {s.shape}" for s in statistics[:6])
        )
    return {variance.name: mean.name for mean, variance in zip(means, variances, strict=True)}


def check_variances(client: str, update: Arrays, start: Arrays, pairs: Mapping[str, str]) -> None:
    """Refuse a negative variance, which would make every later evaluation NaN; rounding may leave one of -1e-6.

    Args:
        client: named in the error.
        update: of it.
        start: what differences are counted from; empty for values.
        pairs: of :func:`statistic_pairs`.

    Raises:
        AggregationError: names the variance.
    """
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
    weights: tuple[float, float],
) -> None:
    """Take one client in, with ``weights`` = (its weight / weight so far, its scale); changes ``means``.

    Differences are averaged as they are: the spread of means does not depend on where they are counted from.
    """
    share, scale = weights
    spread = {variance: update[mean] - means[mean] for variance, mean in pairs.items()}
    for spec in specs:
        if spec.role == TensorRole.COUNTER:
            means[spec.name] = np.maximum(means[spec.name], update[spec.name])
            continue
        own_scale = 1.0 if spec.role == TensorRole.NORM_STAT else scale
        _move(means[spec.name], update[spec.name], share, own_scale)
        if spec.name in spread:
            means[spec.name] += share * (1.0 - share) * spread[spec.name] ** 2


def _move(mean: NDArray[Any], towards: NDArray[Any], share: float, scale: float) -> None:
    """Mean += (scale towards - mean) * share, in place and in blocks that stay in the cache."""
    flat, other = mean.reshape(-1), towards.reshape(-1)
    for begin in range(0, flat.size, _BLOCK):
        block, target = flat[begin : begin + _BLOCK], other[begin : begin + _BLOCK]
        if scale != 1.0:
            target = np.multiply(target, scale, dtype=np.float64)
        difference = np.subtract(target, block, dtype=np.float64)
        difference *= share
        block += difference


def _finish(
    name: str, current: NDArray[Any], means: Mapping[str, NDArray[Any]], upload: UploadSpec
) -> NDArray[Any]:
    if name not in means:
        return current
    return np.asarray(current + means[name] if upload.form == "delta" else means[name]).astype(current.dtype)
