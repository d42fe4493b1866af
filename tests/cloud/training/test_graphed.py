"""Buffers of a recorded step, with a replay that runs the work again."""

from __future__ import annotations

import torch
from torch import Tensor
from wearfleet_cloud.algorithms import State
from wearfleet_cloud.training.graphed import GraphedStep, own_state


def _state(first: float, second: float) -> State:
    return State({"a": torch.tensor(first)}, {"b": torch.tensor(second)}, {}, {})


def _swap(state: State, number: Tensor, keys: Tensor) -> tuple[State, dict[str, Tensor]]:
    """A step whose new state holds tensors of the old one, the other way round."""
    after = State({"a": state.buffers["b"].detach()}, {"b": state.params["a"]}, {}, {})
    return after, {"loss": state.params["a"] * number + keys}


def test_a_state_may_trade_its_tensors() -> None:
    step = GraphedStep(_swap, lambda work: work)
    state = _state(1.0, 2.0)
    for turn in range(4):
        state, metrics = step(state, torch.tensor(10.0), torch.tensor(float(turn)))
        assert float(metrics["loss"]) == (10.0 if turn % 2 == 0 else 20.0) + turn
    assert (float(state.params["a"]), float(state.buffers["b"])) == (1.0, 2.0)


def test_a_state_from_elsewhere_is_taken_and_left_alone() -> None:
    step = GraphedStep(_swap, lambda work: work)
    first, other = _state(1.0, 2.0), _state(5.0, 6.0)
    kept = own_state(step(first, torch.tensor(0.0), torch.tensor(0.0))[0])
    after, _ = step(other, torch.tensor(0.0), torch.tensor(0.0))
    assert (float(after.params["a"]), float(kept.params["a"])) == (6.0, 2.0)
    assert (float(first.params["a"]), float(other.params["a"])) == (1.0, 5.0)
