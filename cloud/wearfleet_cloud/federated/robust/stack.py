"""The updates of a round side by side, as the rules want them: checked one by one, in memory or in a file.

Memory: a matrix of up to ``_IN_MEMORY`` bytes lies in memory; a larger one in a file without a name that is mapped into
memory, whose pages the system takes back when it needs them. Beside it there is one update at a time.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError
from wearfleet_protos.tensors import TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Contribution, check_update, check_variances
from wearfleet_cloud.federated.robust.evidence import Judgement

__all__ = ["Layout", "Stack", "room", "stacked"]

_IN_MEMORY: Final = 512 << 20
_MOST_COUNTED: Final = 2**31
"""A round with more steps is a lie, and counters must not overflow."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which uploaded tensors are judged together, which only by coordinate.

    Args:
        trained: what training moved: one long vector, in this order.
        statistics: of normalisation.
        counters: whole numbers.
    """

    trained: tuple[TensorSpec, ...]
    statistics: tuple[TensorSpec, ...]
    counters: tuple[TensorSpec, ...]

    @staticmethod
    def of(wanted: Sequence[TensorSpec]) -> "Layout":
        """By role.

        Raises:
            AggregationError: nothing trained is uploaded, so there is nothing to judge.
        """
        apart = (TensorRole.NORM_STAT, TensorRole.COUNTER)
        layout = Layout(
            tuple(s for s in wanted if s.role not in apart),
            tuple(s for s in wanted if s.role == TensorRole.NORM_STAT),
            tuple(s for s in wanted if s.role == TensorRole.COUNTER),
        )
        if not sum(_size(s) for s in layout.trained):
            raise AggregationError(
                "a robust rule judges trained tensors, and none are uploaded; use rule=mean"
            )
        return layout


@dataclass(slots=True, eq=False)
class Stack:
    """Updates that can be used.

    Args:
        clients: in the order of rows.
        num_examples: as claimed; used by no rule.
        trained: (K, P) float32 (float64 if a tensor is), scaled.
        statistics: (K, S), as sent.
        counters: for each client its counters by name.
        refused: the others, and why.
    """

    clients: list[str]
    num_examples: list[int]
    trained: NDArray[Any]
    statistics: NDArray[Any]
    counters: list[dict[str, NDArray[Any]]]
    refused: list[Judgement]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, ascending; they move up within the matrix, so nothing is copied beside it."""
        for place, row in enumerate(rows):
            if place != row:
                self.trained[place], self.statistics[place] = self.trained[row], self.statistics[row]
        self.trained, self.statistics = self.trained[: len(rows)], self.statistics[: len(rows)]
        self.clients = [self.clients[row] for row in rows]
        self.num_examples = [self.num_examples[row] for row in rows]
        self.counters = [self.counters[row] for row in rows]


def stacked(
    layout: Layout,
    ordered: Sequence[Contribution],
    wanted: Sequence[TensorSpec],
    start: Arrays,
    pairs: Mapping[str, str],
) -> Stack:
    """Load and check the updates one after the other.

    Args:
        layout: of the uploaded tensors.
        ordered: a client each.
        wanted: uploaded tensors.
        start: what differences are counted from; empty for values.
        pairs: name of each variance to that of its mean.
    """
    trained = _matrix(len(ordered), layout.trained)
    statistics = _matrix(len(ordered), layout.statistics)
    stack = Stack([], [], trained, statistics, [], [])
    for contribution in ordered:
        update = contribution.load()
        try:
            check_update(update, wanted, client=contribution.client)
            check_variances(contribution.client, update, start, pairs)
            _check_counters(update, layout.counters)
        except AggregationError as error:
            stack.refused.append(Judgement(contribution.client, "refused", str(error), suspect=True))
            continue
        row = len(stack.clients)
        _fill(trained[row], update, layout.trained, contribution.scale)
        _fill(statistics[row], update, layout.statistics, 1.0)
        stack.clients.append(contribution.client)
        stack.num_examples.append(contribution.num_examples)
        stack.counters.append({s.name: np.array(update[s.name]) for s in layout.counters})
    stack.trained, stack.statistics = trained[: len(stack.clients)], statistics[: len(stack.clients)]
    return stack


def room(shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A matrix without values, in memory or, if it is large, in a file without a name."""
    if shape[0] * shape[1] * dtype.itemsize <= _IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:  # the mapping outlives the descriptor
        return np.memmap(file, dtype, "w+", shape=shape)


def _size(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64))


def _matrix(count: int, specs: Iterable[TensorSpec]) -> NDArray[Any]:
    known = tuple(specs)
    dtype = np.result_type(np.float32, *(np.dtype(s.dtype) for s in known))
    return room((count, sum(_size(s) for s in known)), dtype)


def _fill(row: NDArray[Any], update: Arrays, specs: Iterable[TensorSpec], scale: float) -> None:
    begin = 0
    for spec in specs:
        flat: NDArray[Any] = update[spec.name].reshape(-1)
        row[begin : begin + flat.size] = flat if scale == 1.0 else np.multiply(flat, scale, dtype=np.float64)
        begin += flat.size


def _check_counters(update: Arrays, counters: Iterable[TensorSpec]) -> None:
    for spec in counters:
        values: NDArray[Any] = update[spec.name]
        if values.size and max(abs(int(values.max())), abs(int(values.min()))) > _MOST_COUNTED:
            raise AggregationError(
                f"counter {spec.name} holds {values.max()}, at most {_MOST_COUNTED} expected"
            )
