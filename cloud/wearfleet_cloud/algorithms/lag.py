"""LAG: align the source domains in two views of a window, whole and in patches."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import Tensor
from wearfleet_models import ModelSpec
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.algorithms.base import CORRECTED, MODES, Algorithm, AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.losses import accuracy, domain_risks
from wearfleet_cloud.algorithms.passes import features_of_domains
from wearfleet_cloud.algorithms.penalised import Losses, Penalised
from wearfleet_cloud.kernels.coral import coral_penalty

__all__ = ["Lag"]

_BACKBONES: Final = {"cnn": "lag-cnn", "transformer": "lag-transformer"}
_NECKS: Final = ("backbone.whole_neck.", "backbone.local_neck.")


@dataclass(frozen=True, slots=True)
class Lag(Penalised):
    """L = mean of the domain risks + gamma * P(whole view) + local_gamma * P(view of patches), P as in CORAL.

    The network is the two-view form of the CNN or Transformer that was asked for; its features are both views side
    by side, every domain normalised by its own batch statistics. Mode "strict": the linear layers and normalisations
    to 256 numbers that end the two views are never trained, so that they stay random projections (pitfall P2).

    Source: Lu, Chen, Wang and Qin 2022, "Local and global alignments for generalizable sensor-based human activity
    recognition", ICASSP; specs/ood.md 2.8, ``kernels/coral`` for P.
    Differs: written from the benchmark's code as specs/ood.md describes it; patches as in ``backbones/lag``.

    Raises:
        ConfigError: unknown mode.
    """

    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="lag",
        title="LAG",
        paper="Lu et al. 2022, ICASSP",
        family="alignment",
        needs=("domain labels",),
        forward="per-domain",
        inference="backbone with both views + head",
        hyper={"gamma": 1.0, "local_gamma": 1.0},
        options={"mode": MODES},
    )

    def __post_init__(self) -> None:
        Algorithm.__post_init__(self)
        if self.mode not in MODES:
            raise ConfigError(f"mode of lag must be {' or '.join(MODES)}, got {self.mode!r}")

    @classmethod
    def network(cls, spec: ModelSpec, domains: int, options: Mapping[str, str]) -> ModelSpec:
        """As ``Algorithm.network``: the two-view form of the backbone.

        Raises:
            ConfigError: a backbone that has none.
        """
        if spec.backbone not in {*_BACKBONES, *_BACKBONES.values()}:
            raise ConfigError(
                f"lag has two views of the backbones {' and '.join(_BACKBONES)} only, got {spec.backbone!r}"
            )
        return replace(spec, backbone=_BACKBONES.get(spec.backbone, spec.backbone), neck=cls.info.neck)

    def trained(self) -> Collection[str] | None:
        """As ``Penalised.trained``: all, in strict mode all but what ends the views."""
        if self.mode == CORRECTED:
            return None
        return [name for name, _ in self.model.named_parameters() if not name.startswith(_NECKS)]

    def weight(self, state: State, hyper: Mapping[str, Tensor]) -> Tensor:
        """As ``Penalised.weight``: 1, because each view has a weight of its own."""
        return torch.ones_like(hyper["gamma"])

    def losses(
        self, params: Tensors, buffers: Tensors, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> Losses:
        """As ``Penalised.losses``."""
        features, logits, after = features_of_domains(self.model, params, buffers, batch, rng)
        whole, local = features.chunk(2, dim=-1)
        penalty = hyper["gamma"] * coral_penalty(whole, batch.weight)
        penalty = penalty + hyper["local_gamma"] * coral_penalty(local, batch.weight)
        risk = domain_risks(logits, batch.y, batch.weight).mean()
        return Losses(risk, penalty, {"accuracy": accuracy(logits, batch.y, batch.weight)}, after)
