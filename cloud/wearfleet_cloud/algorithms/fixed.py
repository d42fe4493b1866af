"""FIX and FIXED: mix features that hide their domain; FIXED also asks for a large margin."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from wearfleet_models import randomness

from wearfleet_cloud.algorithms.base import CORRECTED, MODES, Algorithm, AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.discriminator import Discriminator, adversarial_risk, domain_labels
from wearfleet_cloud.algorithms.gradients import descend
from wearfleet_cloud.algorithms.losses import mixed_accuracy, mixed_risk
from wearfleet_cloud.algorithms.margin_risk import mixed_margin_risks
from wearfleet_cloud.algorithms.passes import embed, head, pooled

__all__ = ["Fix", "Fixed", "Pairs"]

_PARTNERS, _SHARE = 1_000, 1_001
_DOMAINS = "domains"


class Pairs(NamedTuple):
    """What is mixed with what.

    Args:
        partner: (N,) int64 row that a row is mixed with.
        y: (N,) int64 label of the row.
        other: (N,) int64 label of the partner.
        share: () of the row.
        weight: (N,) product of both weights, or None.
    """

    partner: Tensor
    y: Tensor
    other: Tensor
    share: Tensor
    weight: Tensor | None


@dataclass(frozen=True, slots=True)
class Fix(Algorithm):
    """L = lam CE(h(z~), y) + (1 - lam) CE(h(z~), y') + CE(D(GRL(z)), domain), z~ = lam z + (1 - lam) z'.

    z is the embedding behind the bottleneck, z' that of a random window of any domain, lam ~ Beta(mixup_alpha,
    mixup_alpha) once a step; the gradient of D's risk reaches z multiplied by -reversal.

    Source: Lu et al. 2024, arXiv:2211.05228; specs/ood.md 3.2.
    """

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="fix",
        title="FIX",
        paper="Lu et al. 2024, arXiv:2211.05228",
        family="augmentation",
        needs=("domain labels",),
        forward="joint",
        inference="backbone + bottleneck + head",
        hyper={"mixup_alpha": 0.1, "reversal": 0.5},
        options={},
        neck="bottleneck",
    )

    def modules(self) -> dict[str, nn.Module]:
        """The discriminator of domains."""
        return {_DOMAINS: Discriminator(self.model.neck.num_features, self.domains)}

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss", "risk", "domain_risk" and "accuracy" (both labels by their share)."""
        x, y, weight = pooled(batch)
        domain = domain_labels(batch.y.shape[0], batch.y.shape[1], y.device)
        pairs = _pairs(y, weight, hyper["mixup_alpha"], rng)

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            z, after = embed(self.model, params, buffers, x, weight, rng)
            domain_risk, after = adversarial_risk(
                _DOMAINS, self.parts, params, after, z, domain, hyper["reversal"], weight
            )
            logits = head(params, torch.lerp(z[pairs.partner], z, pairs.share))
            risk = self.risk(logits, params["head.weight"], pairs, hyper)
            right = mixed_accuracy(logits, pairs.y, pairs.other, pairs.share, pairs.weight)
            metrics = {"risk": risk, "domain_risk": domain_risk, "accuracy": right}
            return risk + domain_risk, (metrics, after)

        return descend(objective, state, self.optimiser, hyper["lr"])

    def risk(self, logits: Tensor, head_weight: Tensor, pairs: Pairs, hyper: Mapping[str, Tensor]) -> Tensor:
        """Of the mixed embeddings.

        Args:
            logits: (N, K).
            head_weight: (K, F) of the linear head.
            pairs: labels and share.
            hyper: as for ``step``.

        Returns:
            ().
        """
        return mixed_risk(logits, pairs.y, pairs.other, pairs.share, pairs.weight)


@dataclass(frozen=True, slots=True)
class Fixed(Fix):
    """FIX with lam LM(z~, y) + (1 - lam) LM(z~, y') in place of the cross-entropies.

    LM = -clip(mean distance in z to the borders to the ``top_k`` strongest other classes, -3 gamma, gamma).

    Source: Lu et al. 2024, arXiv:2211.05228; specs/ood.md 3.2.
    Differs: "corrected" bounds the slope that a distance is divided by (``margin_risk``); "strict" does not.
    """

    top_k: str = "5"
    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="fixed",
        title="FIXED",
        paper="Lu et al. 2024, arXiv:2211.05228",
        family="augmentation",
        needs=("domain labels",),
        forward="joint",
        inference="backbone + bottleneck + head",
        hyper={"mixup_alpha": 0.1, "reversal": 0.5, "gamma": 10.0},
        options={"top_k": ("5", "1", "2"), "mode": MODES},
        neck="bottleneck",
    )

    def risk(self, logits: Tensor, head_weight: Tensor, pairs: Pairs, hyper: Mapping[str, Tensor]) -> Tensor:
        """As ``Fix.risk``, of distances; may be negative."""
        risks = mixed_margin_risks(
            logits[None],
            head_weight,
            torch.stack((pairs.y, pairs.other), dim=1)[None],
            torch.stack((pairs.share, 1.0 - pairs.share)).expand(1, len(pairs.y), 2),
            hyper["gamma"],
            top_k=int(self.top_k),
            mode=self.mode,
            weight=None if pairs.weight is None else pairs.weight[None],
        )
        return risks[0]


def _pairs(y: Tensor, weight: Tensor | None, alpha: Tensor, rng: Tensor) -> Pairs:
    partner = randomness.permutation(rng, _PARTNERS, y.shape[0])
    both = None if weight is None else weight * weight[partner]
    return Pairs(partner, y, y[partner], randomness.beta(rng, _SHARE, alpha), both)
