"""From objectives to updates: one gradient or several, by plain autograd or in a way that ``torch.func`` transforms."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.func import grad_and_value, jacrev
from wearfleet_models.plain import runs_plainly

from wearfleet_cloud.algorithms.base import State, Tensors
from wearfleet_cloud.training.optimisers import Optimiser

__all__ = ["Objective", "Objectives", "descend", "gradient", "gradients", "update"]

Objective = Callable[[Tensors, Tensors], tuple[Tensor, tuple[Tensors, Tensors]]]
"""(params, buffers) -> (loss (), (metrics, new buffers))."""
Objectives = Callable[[Tensors, Tensors], tuple[Tensor | tuple[Tensor, ...], tuple[Tensors, Tensors]]]
"""(params, buffers) -> (losses (M,) or a tuple of M (), (metrics, new buffers)).

A tuple where losses share little: on the tape each gradient then passes through its own part of the graph only.
"""


def descend(
    objective: Objective,
    state: State,
    optimiser: Optimiser,
    lr: Tensor,
    *,
    trained: Collection[str] | None = None,
    slots: str = "",
) -> tuple[State, dict[str, Tensor]]:
    """Differentiate an objective and make one optimiser step.

    Args:
        objective: loss, metrics and new buffers from parameters and buffers.
        state: to start from.
        optimiser: that makes the step.
        lr: () learning rate.
        trained: names of the parameters that move, None for all.
        slots: as for :func:`update`.

    Returns:
        New state (extras unchanged) and the metrics with "loss" added.
    """
    grads, loss, metrics, buffers = gradient(objective, state, trained)
    after = update(state._replace(buffers=buffers), grads, optimiser, lr, slots)
    return after, {"loss": loss, **metrics}


def update(state: State, grads: Tensors, optimiser: Optimiser, lr: Tensor, slots: str = "") -> State:
    """One optimiser step of the parameters that have a gradient.

    Args:
        state: to start from.
        grads: by the name of the parameter; the other parameters stay.
        optimiser: that makes the step.
        lr: () learning rate.
        slots: prefix of the optimiser's slots, where one state holds those of several optimisers.

    Returns:
        New state.
    """
    moving = {name: state.params[name] for name in grads}
    own = {name.removeprefix(slots): slot for name, slot in state.slots.items() if name.startswith(slots)}
    params, moved = optimiser.update(moving, grads, own, lr)
    moved = {f"{slots}{name}": slot for name, slot in moved.items()}
    return state._replace(params={**state.params, **params}, slots={**state.slots, **moved})


def gradient(
    objective: Objective, state: State, trained: Collection[str] | None = None
) -> tuple[Tensors, Tensor, Tensors, Tensors]:
    """The gradient of one objective.

    Args:
        objective: loss, metrics and new buffers from parameters and buffers.
        state: where.
        trained: names of the parameters to differentiate by, None for all.

    Returns:
        Gradient by name, loss, metrics, buffers after the pass.
    """
    moving, rest = _split(state.params, trained)
    if not runs_plainly():
        grads, (loss, (metrics, buffers)) = grad_and_value(
            lambda params: objective({**rest, **params}, state.buffers), has_aux=True
        )(moving)
        return grads, loss, metrics, buffers
    leaves = {name: p.detach().requires_grad_() for name, p in moving.items()}
    with torch.enable_grad():  # plain autograd saves a fifth of a small step
        loss, (metrics, buffers) = objective({**rest, **leaves}, state.buffers)
    found = torch.autograd.grad(loss, tuple(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True)), loss.detach(), _detached(metrics), _detached(buffers)


def gradients(
    objectives: Objectives, state: State, trained: Collection[str] | None = None
) -> tuple[Tensors, Tensor, Tensors, Tensors]:
    """The gradients of several objectives of one forward pass.

    Args:
        objectives: losses, metrics and new buffers from parameters and buffers.
        state: where.
        trained: names of the parameters to differentiate by, None for all.

    Returns:
        Gradients (M, ...) by name, losses (M,), metrics, buffers after the pass.
    """
    moving, rest = _split(state.params, trained)
    if not runs_plainly():

        def losses(params: Tensors) -> tuple[Tensor, tuple[Tensor, Tensors, Tensors]]:
            given, (metrics, buffers) = objectives({**rest, **params}, state.buffers)
            values = _stacked(given)
            return values, (values, metrics, buffers)

        grads, (values, metrics, buffers) = jacrev(losses, has_aux=True)(moving)
        return grads, values, metrics, buffers
    leaves = {name: p.detach().requires_grad_() for name, p in moving.items()}
    with torch.enable_grad():
        given, (metrics, buffers) = objectives({**rest, **leaves}, state.buffers)
    inputs, count = tuple(leaves.values()), len(given)
    rows = [
        torch.autograd.grad(
            given[m], inputs, retain_graph=m + 1 < count, allow_unused=True, materialize_grads=True
        )
        for m in range(count)
    ]
    stacked = {name: torch.stack(found) for name, found in zip(leaves, zip(*rows, strict=True), strict=True)}
    return stacked, _stacked(given).detach(), _detached(metrics), _detached(buffers)


def _split(params: Tensors, trained: Collection[str] | None) -> tuple[Tensors, Tensors]:
    if trained is None:
        return params, {}
    return {n: params[n] for n in trained}, {n: p for n, p in params.items() if n not in trained}


def _stacked(losses: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(losses) if isinstance(losses, tuple) else losses


def _detached(tensors: Tensors) -> Tensors:
    return {name: value.detach() for name, value in tensors.items()}
