"""Methods of the form risk + weight * penalty, so that others can weigh the two anew (``guided``)."""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wearfleet_cloud.algorithms.base import Algorithm, Batch, State, Tensors
from wearfleet_cloud.algorithms.gradients import descend

__all__ = ["Losses", "Penalised", "annealed", "count_step"]

STEP = "penalty/step"
"""Buffer that counts the steps made, () float32."""


class Losses(NamedTuple):
    """The two terms, () each, metrics, and the buffers after the pass."""

    risk: Tensor
    penalty: Tensor
    metrics: Tensors
    buffers: Tensors


@dataclass(frozen=True, slots=True)
class Penalised(Algorithm):
    """L = risk + weight * penalty; arguments as for ``Algorithm``."""

    @abstractmethod
    def losses(
        self, params: Tensors, buffers: Tensors, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> Losses:
        """Both terms on a batch; arguments as for ``step``, with parameters and buffers by name."""

    def weight(self, state: State, hyper: Mapping[str, Tensor]) -> Tensor:
        """() weight of the penalty in the step that starts from ``state``."""
        return hyper["gamma"]

    def ready(self, state: State, hyper: Mapping[str, Tensor]) -> State:
        """The state a step really starts from."""
        return state

    def trained(self) -> Collection[str] | None:
        """Names of the parameters that move, None for all."""
        return None

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss", "risk", "penalty" and "accuracy"."""
        state = self.ready(state, hyper)
        weight = self.weight(state, hyper)

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            found = self.losses(params, buffers, batch, hyper, rng)
            metrics = {"risk": found.risk, "penalty": found.penalty, **found.metrics}
            return found.risk + weight * found.penalty, (metrics, found.buffers)

        return descend(objective, state, self.optimiser, hyper["lr"], trained=self.trained())


def count_step(buffers: Tensors) -> Tensors:
    """The buffers with one step more counted."""
    return {**buffers, STEP: buffers[STEP] + 1.0}


def annealed(state: State, steps: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, State]:
    """A weight that changes after so many steps, when the optimiser starts anew.

    Args:
        state: with the buffer ``STEP``.
        steps: () made with the first weight.
        before: () the first weight.
        after: () the second.

    Returns:
        The weight of the next step, and the state with all slots 0 when the second weight begins.
    """
    made = state.buffers[STEP]
    begins = made == steps
    slots = {name: torch.where(begins, torch.zeros_like(slot), slot) for name, slot in state.slots.items()}
    return torch.where(made < steps, before, after), state._replace(slots=slots)
