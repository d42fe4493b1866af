"""A strategy's fold with what a robust rule remembers from round to round, beside the strategy's own state."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from wearfleet_protos.tensors import TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Contribution
from wearfleet_cloud.federated.base import Strategy

__all__ = ["fold_robustly"]

_PREFIX: Final = "robust/"


def fold_robustly(
    strategy: Strategy,
    specs: Sequence[TensorSpec],
    current: Arrays,
    state: Arrays,
    contributions: Iterable[Contribution],
) -> Averaged:
    """``Strategy.server``; with a robust rule its memory goes in and out of the state, as ``robust/<name>``.

    Args:
        strategy: with its options.
        specs: ``Plan.tensors``.
        current: global tensors that the clients started from.
        state: what the last fold left.
        contributions: any order.

    Raises:
        AggregationError: as ``Strategy.server``.
    """
    if not strategy.averaging.addition:
        return strategy.server(specs, current, state, contributions)
    memory = {name.removeprefix(_PREFIX): a for name, a in state.items() if name.startswith(_PREFIX)}
    own = {name: a for name, a in state.items() if not name.startswith(_PREFIX)}
    remembering = strategy.averaged_by(replace(strategy.averaging, memory=memory))
    averaged = remembering.server(specs, current, own, contributions)
    after = {_PREFIX + name: array for name, array in averaged.mean.memory.items()}
    return replace(averaged, state={**averaged.state, **after})
