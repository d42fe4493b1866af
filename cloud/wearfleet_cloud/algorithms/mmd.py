"""MMD: align the distributions of the features of all pairs of source domains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.algorithms.base import Algorithm, AlgorithmInfo, Batch, Tensors
from wearfleet_cloud.algorithms.losses import accuracy, domain_risks
from wearfleet_cloud.algorithms.passes import features_of_domains
from wearfleet_cloud.algorithms.penalised import Losses, Penalised
from wearfleet_cloud.kernels.mmd import FIXED_GAMMAS, constants, median_gammas, mmd

__all__ = ["Mmd"]


@dataclass(frozen=True, slots=True)
class Mmd(Penalised):
    """L = mean of the domain risks + gamma * mean over pairs of domains of MMD^2, the biased estimate.

    Every domain is normalised by its own batch statistics. Bandwidths "fixed": the seven of the published
    code, 1e-3 to 1e3, of which on features of hundreds of dimensions only the first two still have a slope
    (pitfall P13). Bandwidths "median": five around the median squared distance of the batch.

    Source: Li et al. 2018, "Domain generalization with adversarial feature learning", CVPR, equation 4;
    Gretton et al. 2012, JMLR 13, equation 5; specs/ood.md 2.6, ``kernels/mmd`` for the penalty.
    Differs: the distance alone, without the adversarial autoencoder of the paper (as DomainBed and HAROOD do).

    Raises:
        ConfigError: unknown bandwidths.
    """

    bandwidths: str = "fixed"
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="mmd",
        title="MMD",
        paper="Li et al. 2018, CVPR (MMD-AAE)",
        family="alignment",
        needs=("domain labels",),
        forward="per-domain",
        inference="backbone + head",
        hyper={"gamma": 1.0},
        options={"bandwidths": ("fixed", "median")},
    )

    def __post_init__(self) -> None:
        Algorithm.__post_init__(self)
        if self.bandwidths not in self.info.options["bandwidths"]:
            raise ConfigError(f"bandwidths of mmd must be fixed or median, got {self.bandwidths!r}")

    def losses(
        self, params: Tensors, buffers: Tensors, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> Losses:
        """As ``Penalised.losses``."""
        features, logits, after = features_of_domains(self.model, params, buffers, batch, rng)
        risk = domain_risks(logits, batch.y, batch.weight).mean()
        metrics = {"accuracy": accuracy(logits, batch.y, batch.weight)}
        penalty = mmd(features, self._gammas(features, batch.weight), batch.weight)
        return Losses(risk, penalty, metrics, after)

    def _gammas(self, features: Tensor, weight: Tensor | None) -> Tensor:
        if self.bandwidths == "median":
            return median_gammas(features, weight)
        return constants(FIXED_GAMMAS, features)
