"""ERM: minimise the mean risk over the windows of all source domains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from wearfleet_cloud.algorithms.base import Algorithm, AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.gradients import descend
from wearfleet_cloud.algorithms.losses import accuracy, cross_entropy
from wearfleet_cloud.algorithms.passes import call, pooled

__all__ = ["Erm"]


@dataclass(frozen=True, slots=True)
class Erm(Algorithm):
    """L = CE(h(F(x)), y) over the windows of all domains together, normalised by joint batch statistics.

    Source: Vapnik 1998, "Statistical Learning Theory"; specs/ood.md 2.1.
    """

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="erm",
        title="ERM",
        paper="Vapnik 1998, Statistical Learning Theory",
        family="baseline",
        needs=(),
        forward="joint",
        inference="backbone + head",
        hyper={},
        options={},
    )

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss" and "accuracy"."""
        x, y, weight = pooled(batch)

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            logits, after = call(self.model, params, buffers, x, weight, rng)
            return cross_entropy(logits, y, weight), ({"accuracy": accuracy(logits, y, weight)}, after)

        return descend(objective, state, self.optimiser, hyper["lr"])
