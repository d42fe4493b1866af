"""DANN: features from which a discriminator cannot tell the source domain."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from wearfleet_cloud.algorithms.base import AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.discriminator import Discriminator, adversarial_risk, domain_labels
from wearfleet_cloud.algorithms.losses import accuracy, cross_entropy
from wearfleet_cloud.algorithms.passes import embed, head, pooled
from wearfleet_cloud.algorithms.penalised import Losses, Penalised

__all__ = ["Dann"]

_PART = "discriminator"


@dataclass(frozen=True, slots=True)
class Dann(Penalised):
    """L = CE(h(z), y) + CE(D(reversed(z)), domain) with z = F(x) of all domains together.

    The discriminator D descends its cross-entropy; the features ascend it, ``alpha`` times as fast. One
    optimiser moves all.

    Source: Ganin et al. 2016, arXiv:1505.07818, equations 13 to 15; specs/ood.md 2.4.
    Differs: tells the source domains from each other instead of source from target; ``alpha`` is constant,
    where the paper lets it grow from 0 (both as HAROOD).
    """

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="dann",
        title="DANN",
        paper="Ganin et al. 2016, arXiv:1505.07818",
        family="adversarial",
        needs=("domain labels",),
        forward="joint",
        inference="backbone + head",
        hyper={"alpha": 1.0},
        options={},
    )

    def modules(self) -> dict[str, nn.Module]:
        """As ``Algorithm.modules``: the discriminator."""
        return {_PART: Discriminator(self.model.head.in_features, self.domains)}

    def weight(self, state: State, hyper: Mapping[str, Tensor]) -> Tensor:
        """As ``Penalised.weight``: 1, because the reversal already weighs what reaches the features."""
        return torch.ones_like(hyper["alpha"])

    def losses(
        self, params: Tensors, buffers: Tensors, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> Losses:
        """As ``Penalised.losses``."""
        x, y, weight = pooled(batch)
        domain = domain_labels(batch.y.shape[0], batch.y.shape[1], y.device)
        features, buffers = embed(self.model, params, buffers, x, weight, rng)
        logits = head(params, features)
        told, after = adversarial_risk(
            _PART, self.parts, params, buffers, features, domain, hyper["alpha"], weight
        )
        metrics = {"accuracy": accuracy(logits, y, weight)}
        return Losses(cross_entropy(logits, y, weight), told, metrics, after)
