"""CORAL: align mean and covariance of the features of all pairs of source domains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from wearfleet_models import Classifier

from wearfleet_cloud.algorithms.base import (
    AlgorithmInfo,
    Batch,
    State,
    Tensors,
    accuracy,
    descend,
    domain_risks,
    features_of_domains,
    initial_state,
)
from wearfleet_cloud.kernels.coral import coral_penalty
from wearfleet_cloud.training.optimisers import Optimiser

__all__ = ["Coral"]


@dataclass(frozen=True, slots=True)
class Coral:
    """L = mean of the domain risks + gamma * penalty; every domain is normalised by its own batch statistics.

    Source: Sun and Saenko 2016, arXiv:1607.01719; specs/ood.md 2.5, ``kernels/coral`` for the penalty.
    Differs: also aligns the means, averages over all pairs of sources instead of one source and one target,
    and divides by the number of entries instead of 4 F^2 (as DomainBed and HAROOD do).
    """

    model: Classifier
    optimiser: Optimiser
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="coral",
        title="CORAL",
        paper="Sun and Saenko 2016, arXiv:1607.01719",
        family="alignment",
        needs=("domain labels",),
        forward="per-domain",
        inference="backbone + head",
        hyper={"gamma": 1.0},
        options={},
    )

    def init(self) -> State:
        """As ``Algorithm.init``."""
        return initial_state(self.model, self.optimiser)

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss", "risk", "penalty" and "accuracy"."""

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            features, logits, after = features_of_domains(self.model, params, buffers, batch, rng)
            risk = domain_risks(logits, batch.y, batch.weight).mean()
            right = accuracy(logits, batch.y, batch.weight)
            penalty = coral_penalty(features, batch.weight)
            loss = risk + hyper["gamma"] * penalty
            return loss, ({"risk": risk, "penalty": penalty, "accuracy": right}, after)

        return descend(objective, state, self.optimiser, hyper["lr"])
