"""CORAL: align mean and covariance of the features of all pairs of source domains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from wearfleet_cloud.algorithms.base import AlgorithmInfo, Batch, Tensors
from wearfleet_cloud.algorithms.losses import accuracy, domain_risks
from wearfleet_cloud.algorithms.passes import features_of_domains
from wearfleet_cloud.algorithms.penalised import Losses, Penalised
from wearfleet_cloud.kernels.coral import coral_penalty

__all__ = ["Coral"]


@dataclass(frozen=True, slots=True)
class Coral(Penalised):
    """L = mean of the domain risks + gamma * penalty; every domain is normalised by its own batch statistics.

    Source: Sun and Saenko 2016, arXiv:1607.01719; specs/ood.md 2.5, ``kernels/coral`` for the penalty.
    Differs: also aligns the means, averages over all pairs of sources instead of one source and one target,
    and divides by the number of entries instead of 4 F^2 (as DomainBed and HAROOD do).
    """

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

    def losses(
        self, params: Tensors, buffers: Tensors, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> Losses:
        """As ``Penalised.losses``."""
        features, logits, after = features_of_domains(self.model, params, buffers, batch, rng)
        risk = domain_risks(logits, batch.y, batch.weight).mean()
        metrics = {"accuracy": accuracy(logits, batch.y, batch.weight)}
        return Losses(risk, coral_penalty(features, batch.weight), metrics, after)
