"""A robust mean of the updates of a round: first checks, the rule, and what is said of each client.

What training moved is one vector per client and goes through the rule. Statistics of normalisation are the median by
coordinate and counters the largest, whatever the rule. Claimed numbers of windows are not looked at.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from wearfleet_protos.plan import UploadSpec
from wearfleet_protos.tensors import TensorSpec

from wearfleet_cloud.federated.aggregate import (
    Arrays,
    Averaging,
    Contribution,
    Mean,
    check_current,
    one_each,
    statistic_pairs,
    uploaded,
)
from wearfleet_cloud.federated.robust import rules
from wearfleet_cloud.federated.robust.evidence import OUTLYING, Judgement
from wearfleet_cloud.federated.robust.options import TooFewUpdatesError, check_bound
from wearfleet_cloud.federated.robust.rules import Combined
from wearfleet_cloud.federated.robust.stack import Layout, Stack, room, stacked
from wearfleet_cloud.kernels.robust import coordinate_median, squared_norms, weighted_mean

__all__ = ["robust_mean"]

_NORMS: Final = "norms"
_CENTRE: Final = "centre/"
_REMEMBERED: Final = 20
"""Rounds whose median norms make the running median."""
_LARGEST: Final = 10.0
"""An update so many times longer than the running median is refused."""


def robust_mean(
    specs: Sequence[TensorSpec],
    upload: UploadSpec,
    current: Arrays,
    contributions: Iterable[Contribution],
    averaging: Averaging,
) -> Mean:
    """What ``averaging.rule`` makes of the updates of a round.

    Args:
        specs: the plan's tensors in their order (``Plan.tensors``).
        upload: roles, groups and form of the updates.
        current: global tensors that the clients started from.
        contributions: any order.
        averaging: rule and options; its memory is what the last round left.

    Raises:
        AggregationError: a client twice, or nothing trained is uploaded.
        TooFewUpdatesError: fewer updates than the rule needs pass the first checks.

    Source: specs/federated.md section 16; the rules name their papers.
    """
    ordered = one_each(contributions)
    wanted = uploaded(specs, upload)
    check_current(current, wanted)
    layout, pairs = Layout.of(wanted), statistic_pairs(wanted)
    stack = stacked(layout, ordered, wanted, current if upload.form == "delta" else {}, pairs)
    norms, remembered = _within_norm(stack, averaging.memory.get(_NORMS))
    rows = torch.from_numpy(stack.trained)
    members = _buckets(stack, averaging.bucket)
    points = rows if averaging.bucket == 1 else _bucket_means(rows, members)
    check_bound(
        averaging.rule,
        len(points),
        attackers=averaging.attackers,
        trim=averaging.trim,
        selected=averaging.selected,
        refused=stack.refused,
    )
    combined = _apply(averaging, points, _centre(averaging.memory, layout, rows))
    values = _named(layout.trained, combined.value.double().numpy())
    memory: dict[str, NDArray[np.generic]] = {_NORMS: remembered}
    if averaging.rule == "centred-clipping":
        memory |= {_CENTRE + name: value for name, value in values.items()}
    values |= _untrained(layout, stack)
    evidence = (*stack.refused, *_judged(stack, norms, combined, members, rows))
    by_name = tuple(sorted(evidence, key=lambda judgement: judgement.client))
    return Mean(
        {spec.name: values[spec.name] for spec in wanted},
        tuple(stack.clients),
        sum(stack.num_examples),
        by_name,
        memory,
    )


def _within_norm(stack: Stack, before: NDArray[np.generic] | None) -> tuple[Tensor, NDArray[np.float64]]:
    """Refuse what is far longer than the running median; norms of the others, and the medians to remember.

    The running median is that of the median norms of the last rounds and of this one.
    """
    if not stack.clients:
        raise TooFewUpdatesError(_nobody(stack.refused), stack.refused)
    norms = squared_norms(torch.from_numpy(stack.trained)).sqrt()
    known = np.empty(0) if before is None else np.asarray(before, np.float64)
    remembered = np.append(known, float(norms.median()))[-_REMEMBERED - 1 :]
    limit = _LARGEST * float(np.median(remembered))
    kept = [row for row, norm in enumerate(norms.tolist()) if norm <= limit]
    for row in sorted(set(range(len(norms))) - set(kept)):
        reason = f"norm {float(norms[row]):.3g} is above {limit:.3g}, {_LARGEST:g} times the running median"
        stack.refused.append(
            Judgement(stack.clients[row], "refused", reason, norm=float(norms[row]), suspect=True)
        )
    stack.keep(kept)
    if not kept:
        raise TooFewUpdatesError(_nobody(stack.refused), stack.refused)
    return norms[kept], remembered


def _nobody(refused: Sequence[Judgement]) -> str:
    first = f"; the first: {refused[0].client}: {refused[0].reason}" if refused else ""
    return f"no update of the round can be used, {len(refused)} were refused{first}"


def _buckets(stack: Stack, size: int) -> list[list[int]]:
    """Rows shared out at random to buckets; nobody can foresee how, since every update goes into the seed.

    Source: Karimireddy et al. 2022, arXiv:2006.09365, algorithm 1.
    """
    count = len(stack.clients)
    if size == 1:
        return [[row] for row in range(count)]
    digest = hashlib.sha256("\n".join(stack.clients).encode())
    for row in stack.trained:
        digest.update(np.ascontiguousarray(row).data)
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest.digest(), "big")))
    order = generator.permutation(count).tolist()
    return [sorted(order[begin : begin + size]) for begin in range(0, count, size)]


def _bucket_means(rows: Tensor, members: Sequence[Sequence[int]]) -> Tensor:
    means = torch.from_numpy(room((len(members), rows.shape[1]), rows.numpy().dtype))
    for place, own in enumerate(members):
        means[place] = weighted_mean(rows[list(own)], torch.ones(len(own)))
    return means


def _apply(averaging: Averaging, points: Tensor, centre: Tensor) -> Combined:
    """The rule by its name (``options.RULES``)."""
    f = averaging.attackers
    made = {
        "krum": lambda: rules.krum(points, f, 1),
        "multi-krum": lambda: rules.krum(points, f, averaging.selected),
        "trimmed-mean": lambda: rules.trimmed(points, averaging.trim),
        "median": lambda: rules.median(points),
        "bulyan": lambda: rules.bulyan(points, f),
        "geometric-median": lambda: rules.geometric_median(points),
        "norm-bound": lambda: rules.clipped_mean(points, averaging.bound),
        "centred-clipping": lambda: rules.centred_clipping(points, centre, averaging.bound),
    }
    return made[averaging.rule]()


def _centre(memory: Arrays, layout: Layout, rows: Tensor) -> Tensor:
    """The aggregate of the round before; zeros before the first."""
    parts = [
        memory[_CENTRE + spec.name].reshape(-1) for spec in layout.trained if _CENTRE + spec.name in memory
    ]
    return (
        torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(rows.shape[1], dtype=torch.float64)
    )


def _untrained(layout: Layout, stack: Stack) -> dict[str, NDArray[Any]]:
    values: dict[str, NDArray[Any]] = {}
    if layout.statistics:
        middle = coordinate_median(torch.from_numpy(stack.statistics))
        values |= _named(layout.statistics, middle.double().numpy())
    for spec in layout.counters:
        values[spec.name] = np.max([own[spec.name] for own in stack.counters], axis=0).astype(spec.dtype)
    return values


def _named(specs: Sequence[TensorSpec], flat: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    """The parts of a long vector by name."""
    values: dict[str, NDArray[Any]] = {}
    begin = 0
    for spec in specs:
        size = int(np.prod(spec.shape, dtype=np.int64))
        values[spec.name] = flat[begin : begin + size].reshape(spec.shape)
        begin += size
    return values


def _judged(
    stack: Stack, norms: Tensor, combined: Combined, members: Sequence[Sequence[int]], rows: Tensor
) -> list[Judgement]:
    """What became of each client whose update passed the first checks."""
    distances = rules.distances_from(rows, combined.value)
    limit = OUTLYING * float(distances.median())
    place = {row: bucket for bucket, own in enumerate(members) for row in own}
    judged = []
    for row, client in enumerate(stack.clients):
        share = float(combined.shares[place[row]])
        verdict, reason = _verdict(share, len(members[place[row]]))
        far = float(distances[row]) > limit
        if far:
            found = (
                f"it lies {float(distances[row]):.3g} from the aggregate, above {limit:.3g}, "
                f"{OUTLYING:g} times the median distance"
            )
            reason = f"{reason}; {found}" if reason else found
        score = 0.0 if combined.scores is None else float(combined.scores[place[row]])
        judged.append(
            Judgement(client, verdict, reason, float(norms[row]), float(distances[row]), score, suspect=far)
        )
    return judged


def _verdict(share: float, together: int) -> tuple[Any, str]:
    """Of a row that is in the aggregate with this share; a bucket's verdict is that of its clients."""
    bucket = f" (a bucket of {together})" if together > 1 else ""
    if share == 0.0:
        return "left out", f"the rule chose others{bucket}"
    if share < 1.0:
        return "clipped", f"shortened to {100 * share:.1f} %{bucket}"
    return "counted", ""
