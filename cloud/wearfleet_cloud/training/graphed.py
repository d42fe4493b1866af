"""A step recorded once and replayed: on a GPU a small step is bound by its hundreds of launches, a replay is one.

The step is pure, so it may be run for warm-up and recorded on whatever the buffers hold; the real state is copied in
afterwards. Its windows, hyper-parameters and tables stay where they are in memory, which a recording relies on.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from wearfleet_cloud.algorithms.base import State, Tensors

__all__ = ["GraphedStep", "Recorder", "StepFunction", "cuda_recorder", "own_state"]

_log = logging.getLogger(__name__)

StepFunction = Callable[[State, Tensor, Tensor], tuple[State, Tensors]]
"""(state, numbers of the windows, keys) -> (new state, metrics)."""
Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""From work on fixed buffers, something that does it again."""

_WARM_UP: Final = 3


def cuda_recorder(work: Callable[[], None]) -> Callable[[], None]:
    """Record work as a CUDA graph, after some runs in which libraries choose and compile what they need."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class GraphedStep:
    """One step function with buffers of its own.

    Args:
        step: pure; what it reads besides its arguments must not move in memory.
        recorder: makes the replay. Where the step does what cannot be recorded, it fails, and the step runs as it is.
    """

    def __init__(self, step: StepFunction, recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._replay: Callable[[], None] | None = None
        self._recordable = True
        self._state: State
        self._number: Tensor
        self._keys: Tensor
        self._metrics: Tensors

    def __call__(self, state: State, number: Tensor, keys: Tensor) -> tuple[State, Tensors]:
        """Make the step. What it returns is overwritten by the next call: see :func:`own_state`."""
        if self._recordable and self._replay is None:
            self._record(state, number, keys)
        if self._replay is None:
            return self._step(state, number, keys)
        if state is not self._state:
            _copy(self._state, state)
        self._number.copy_(number)
        self._keys.copy_(keys)
        self._replay()
        return self._state, self._metrics

    @property
    def recorded(self) -> bool:
        """Whether the step is replayed."""
        return self._replay is not None

    def _record(self, state: State, number: Tensor, keys: Tensor) -> None:
        self._state, self._number, self._keys = own_state(state), number.clone(), keys.clone()
        self._metrics = {}

        def work() -> None:
            after, metrics = self._step(self._state, self._number, self._keys)
            _copy(self._state, self._settled(after))
            for name, value in metrics.items():
                if name not in self._metrics:
                    self._metrics[name] = torch.empty_like(value)
                self._metrics[name].copy_(value)

        try:
            self._replay = self._recorder(work)
        except RuntimeError as error:
            self._recordable = False
            _log.warning("the step runs without a recording (%s)", error)
        else:
            _copy(self._state, state)

    def _settled(self, after: State) -> State:
        """The new state without tensors that lie in buffers of the old: copying one would change another."""
        buffers = {t.untyped_storage().data_ptr() for part in self._state for t in part.values()}
        return State(
            *(
                {
                    name: t.clone() if t.untyped_storage().data_ptr() in buffers else t
                    for name, t in part.items()
                }
                for part in after
            )
        )


def own_state(state: State) -> State:
    """A copy that no later step overwrites."""
    return State(*({name: tensor.clone() for name, tensor in part.items()} for part in state))


def _copy(to: State, state: State) -> None:
    for own, part in zip(to, state, strict=True):
        _copy_named(own, part)


def _copy_named(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    for name, tensor in given.items():
        own[name].copy_(tensor)
