"""From two launches, one differentiable operation that ``torch.func.vmap`` stacks.

A launch is a function over tensors whose first axis counts independent problems. The operation built here runs
them under autograd and ``torch.func.grad``; ``vmap`` adds its axis to the problems, so that many stacked training
runs are still one launch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function

__all__ = ["Backward", "Forward", "Operation", "operation"]

Forward = Callable[..., tuple[Tensor, ...]]
"""(settings, *inputs) -> (*values, *residuals); every tensor has the problem axis first."""
Backward = Callable[..., tuple[Tensor, ...]]
"""(settings, needs, *inputs, *residuals, *gradients of the values) -> one tensor for each True of ``needs``."""
Operation = Callable[..., tuple[Tensor, ...]]
"""(settings, *inputs) -> values."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What a backward launch must know besides tensors; opaque to ``vmap``."""

    settings: object
    needs: tuple[bool, ...]


def operation(
    forward: Forward, backward: Backward, *, values: int, differentiable: int, constants: int = 0
) -> Operation:
    """Make an operation of a forward and a backward launch.

    Args:
        forward: launch; what it returns after ``values`` tensors is kept for the backward launch.
        backward: launch; computes only the gradients that are needed. It is not differentiated again: a second
            derivative raises RuntimeError.
        values: number of results that have a gradient.
        differentiable: number of leading inputs that have a gradient; the others (labels, weights) have none.
        constants: number of results after the ``values`` that have no gradient; kept for the backward launch too.

    Returns:
        A function of settings (any object that is not a container; shared by all stacked problems) and tensors.
    """
    launch = _forward_launch(forward, _backward_launch(backward), values, differentiable)

    def apply(settings: object, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = launch.apply(settings, *tensors)  # type: ignore[no-untyped-call]
        return outputs[: values + constants]

    return apply


def _backward_launch(backward: Backward) -> type[Function]:
    class BackwardLaunch(Function):
        @staticmethod
        def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
            return backward(call.settings, call.needs, *tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(_ctx: Any, *_gradients: Tensor) -> Any:
            raise RuntimeError(
                "a kernel's gradient has no derivative: use the reference for second derivatives"
            )

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *tensors: Tensor) -> Any:
            return _stacked(BackwardLaunch, info.batch_size, in_dims, call, tensors)

    return BackwardLaunch


def _forward_launch(
    forward: Forward, backward: type[Function], values: int, differentiable: int
) -> type[Function]:
    class ForwardLaunch(Function):
        @staticmethod
        def forward(settings: object, *tensors: Tensor) -> tuple[Tensor, ...]:
            return forward(settings, *tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.settings, tensors = inputs[0], inputs[1:]
            ctx.count = len(tensors)
            ctx.mark_non_differentiable(*output[values:])
            ctx.save_for_backward(*tensors, *output[values:])

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            needs = tuple(ctx.needs_input_grad[1 : 1 + differentiable])
            call = _Call(ctx.settings, needs)
            found = iter(backward.apply(call, *ctx.saved_tensors, *gradients[:values]))  # type: ignore[no-untyped-call]
            given = (next(found) if needed else None for needed in needs)
            return None, *given, *(None,) * (ctx.count - differentiable)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], settings: object, *tensors: Tensor) -> Any:
            return _stacked(ForwardLaunch, info.batch_size, in_dims, settings, tensors)

    return ForwardLaunch


def _stacked(
    function: type[Function],
    runs: int,
    in_dims: tuple[int | None, ...],
    settings: object,
    tensors: tuple[Tensor, ...],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Run ``function`` once on ``runs`` times as many problems."""
    flat = []
    for tensor, dim in zip(tensors, in_dims[1:], strict=True):
        stacked = tensor.expand(runs, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        flat.append(stacked.reshape(-1, *stacked.shape[2:]))
    outputs = function.apply(settings, *flat)  # type: ignore[no-untyped-call]
    split = tuple(output.reshape(runs, -1, *output.shape[1:]) for output in outputs)
    return split, (0,) * len(split)
