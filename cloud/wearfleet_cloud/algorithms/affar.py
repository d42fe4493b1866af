"""AFFAR: fuse what is peculiar to each source domain with what all have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from wearfleet_models import Classifier, ModelSpec
from wearfleet_models.necks import Mixture

from wearfleet_cloud.algorithms.base import AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.discriminator import domain_labels
from wearfleet_cloud.algorithms.losses import accuracy, cross_entropy
from wearfleet_cloud.algorithms.passes import call_around, head, pooled
from wearfleet_cloud.algorithms.penalised import Losses, Penalised
from wearfleet_cloud.kernels.mmd import median_gammas, mmd

__all__ = ["Affar"]


@dataclass(frozen=True, slots=True)
class Affar(Penalised):
    """L = CE(h(s + e), y) + lam * CE(G(f), domain) + beta * MMD of e between the domains, one joint pass.

    f are the features of the backbone, s = sum_a q_a(f) E_a(f) mixes a branch for each source domain by the
    predicted domain q = softmax(G(f)), e = E_0(f) is a branch for all. An unknown person is so a mixture of known
    ones.

    Source: Qin et al. 2022, arXiv:2207.11221; a reconstruction from its description in specs/ood.md 3.6, because no
    code was published: do not take its numbers for the paper's.
    Differs (or may): s and e are added, not concatenated; q is predicted in training too; the MMD is that of e, with
    bandwidths around the median distance.
    """

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="affar",
        title="AFFAR (reconstruction)",
        paper="Qin et al. 2022, arXiv:2207.11221",
        family="alignment",
        needs=("domain labels",),
        forward="joint",
        inference="backbone + mixture of branches + head",
        hyper={"lam": 0.1, "beta": 0.1},
        options={},
        neck="mixture",
    )

    @classmethod
    def network(cls, spec: ModelSpec, domains: int, options: Mapping[str, str]) -> ModelSpec:
        """As ``Algorithm.network``: with a branch for each source domain."""
        return replace(spec, neck=cls.info.neck, domains=domains)

    def weight(self, state: State, hyper: Mapping[str, Tensor]) -> Tensor:
        """As ``Penalised.weight``: 1, because each term has a weight of its own."""
        return torch.ones_like(hyper["lam"])

    def losses(
        self, params: Tensors, buffers: Tensors, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> Losses:
        """As ``Penalised.losses``; metrics "domain_risk" and "discrepancy", not weighed."""
        x, y, weight = pooled(batch)
        domains, windows = batch.y.shape
        found, after = call_around(_Parts(self.model), params, buffers, x, weight, rng)
        width = self.model.head.in_features
        specific, invariant, told = found.split_with_sizes((width, width, found.shape[1] - 2 * width), dim=1)
        common = invariant.reshape(domains, windows, width)
        discrepancy = mmd(common, median_gammas(common, batch.weight), batch.weight)
        domain_risk = cross_entropy(told, domain_labels(domains, windows, y.device), weight)
        logits = head(params, specific + invariant)
        metrics = {
            "accuracy": accuracy(logits, y, weight), "domain_risk": domain_risk, "discrepancy": discrepancy,
        }  # fmt: skip
        penalty = hyper["lam"] * domain_risk + hyper["beta"] * discrepancy
        return Losses(cross_entropy(logits, y, weight), penalty, metrics, after)


class _Parts(nn.Module):
    """A classifier up to the parts of its mixture, side by side: (B, W + W + S)."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, weight: Tensor | None, rng: Tensor | None) -> Tensor:
        features = self.model.backbone(self.model.standardise(x), weight, rng)
        return torch.cat(cast("Mixture", self.model.neck).parts(features), dim=1)
