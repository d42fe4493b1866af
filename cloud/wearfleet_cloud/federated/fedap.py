"""FedAP (AdaFed): every client gets its own mixture of all models, weighted by how alike their layers' inputs are.

Source: Lu et al. 2022, arXiv:2112.00734; f-FedAP and d-FedAP by specs/federated.md section 4.
Differs from the authors' code: the operator gives the reference network, which must not have seen clients' windows
(theirs learns from all clients' validation and test windows too); every statistic is of what enters a normalisation
(theirs takes one behind it); batches are pooled exactly, with biased variances; the global model is the mean of all,
not the last client's mixture; absent clients count with their last model; ``weighting=examples`` counts windows.
Differs from the paper: statistics are measured in every round, because a plan has the same phases in each; the server
keeps the first ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays
from wearfleet_cloud.federated.base import StrategyInfo
from wearfleet_cloud.federated.client_similarity import wasserstein_distances
from wearfleet_cloud.federated.mixtures import MIXTURE_OPTIONS, MixtureStrategy

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientPhase, ClientProgram

__all__ = ["FEDAP_OPTIONS", "FedAP"]

_SOURCES: Final = ("pretrained", "warmup", "dynamic")
_FORMS: Final = ("root", "squared")
_ROUNDING: Final = 1e-6
"""A pooled variance may be so far below 0."""

FEDAP_OPTIONS: Final = {
    **MIXTURE_OPTIONS,
    "weight_source": "pretrained (a reference network, see reference), warmup (own running statistics after rounds of "
    "FedBN) or dynamic (warmup, and again every few rounds)",
    "reference": "folder of the training run whose network measures; it must not have seen clients' windows",
    "warmup_rounds": "rounds of FedBN before the first mixture, of warmup and dynamic; >= 1",
    "every": "rounds between two measurements that change the weights, of dynamic; >= 1",
    "distance": "root (2-Wasserstein a layer) or squared",
}
"""Hyper-parameters in words."""


@dataclass(frozen=True, slots=True)
class FedAP(MixtureStrategy):
    """Mixtures by the statistics of layers; normalisation stays on the device.

    Args:
        weight_source: ``pretrained``, ``warmup`` or ``dynamic``.
        reference: of ``pretrained``; needed where plans are built, not where updates are folded.
        warmup_rounds: of ``warmup`` and ``dynamic``, at least 1.
        every: of ``dynamic``, at least 1.
        distance: ``root`` or ``squared``.

    Raises:
        ConfigError: an option is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedap",
        paper="Lu et al. 2022, arXiv:2112.00734",
        uploaded=(TensorRole.SHARED, TensorRole.HEAD, TensorRole.AUX),
        kept_local=(TensorRole.NORM_AFFINE, TensorRole.NORM_STAT, TensorRole.COUNTER),
        phases=("evaluate_before", "train", "statistics", "evaluate_after"),
        composes_with=("compression", "partial_participation"),
        hyper_parameters=FEDAP_OPTIONS,
        uploaded_groups=(TensorGroup.PARAM, TensorGroup.BUFFER, TensorGroup.AUX),
        own_downlinks=True,
    )
    mixed_roles: ClassVar[tuple[TensorRole, ...]] = (TensorRole.SHARED, TensorRole.HEAD)

    weight_source: str = "warmup"
    reference: str = ""
    warmup_rounds: int = 10
    every: int = 10
    distance: str = "root"

    def __post_init__(self) -> None:
        MixtureStrategy.__post_init__(self)
        name = self.info.name
        for option, known in (("weight_source", _SOURCES), ("distance", _FORMS)):
            if getattr(self, option) not in known:
                raise ConfigError(
                    f"{option} of {name} must be {' or '.join(known)}, got {getattr(self, option)!r}"
                )
        if self.warmup_rounds < 1 or self.every < 1:
            raise ConfigError(
                f"warmup_rounds and every of {name} must be at least 1, got {self.warmup_rounds}, {self.every}"
            )

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local epochs as in FedBN, then the statistics.

        Raises:
            ConfigError: the network has no batch normalisation, or the reference is missing or sees other windows.
        """
        from wearfleet_cloud.federated.client_program import (  # noqa: PLC0415  see FedAvg
            measured,
            model_specs,
            training_phase,
        )

        train, slots = training_phase(model, self.local)
        statistics, specs = self._statistics(model)
        tensors = (*model_specs(model, self.info.kept_local), *slots, *specs)
        return measured(model, self.local, tensors, (train, statistics))

    def distances(self, features: Arrays) -> NDArray[Any]:
        """Wasserstein distances of the layers' inputs."""
        arrays = [np.asarray(array, np.float64) for array in features.values()]
        means, variances = arrays[::2], arrays[1::2]
        sizes = [mean.shape[1] for mean in means]
        deviations = np.sqrt(np.maximum(np.concatenate(variances, axis=1), 0.0))
        return wasserstein_distances(
            np.concatenate(means, axis=1), deviations, sizes, squared=self.distance == "squared"
        )

    def fault(self, features: Arrays) -> str:
        """A negative variance, beyond rounding."""
        lowest = min(float(np.min(variance)) for variance in list(features.values())[1::2])
        return f"a variance among its statistics is negative ({lowest:.3g})" if lowest < -_ROUNDING else ""

    def mixes(self, aggregation: int) -> bool:
        """From the first one with a reference, else after the rounds of FedBN."""
        return self.weight_source == "pretrained" or aggregation >= self.warmup_rounds

    def renews(self, feature: str, aggregation: int) -> bool:  # noqa: ARG002 - all together
        """Never with a reference; else until the first mixture, and if dynamic, again from time to time."""
        if self.weight_source == "pretrained":
            return False
        since = aggregation - self.warmup_rounds
        return since <= 0 or (self.weight_source == "dynamic" and since % self.every == 0)

    def _statistics(self, model: "Classifier") -> tuple["ClientPhase", Sequence[TensorSpec]]:
        from wearfleet_cloud.federated.channel_statistics import pooled_phase, running_phase  # noqa: PLC0415

        own, specs = running_phase(model, self.local)
        if self.weight_source != "pretrained":
            return own, specs
        phase, measured, counter = pooled_phase(self._reference(model), self.local)
        return phase, (*measured, *counter)

    def _reference(self, model: "Classifier") -> "Classifier":
        from wearfleet_cloud.export.run_folder import read_run  # noqa: PLC0415  see FedAvg

        if not self.reference:
            raise ConfigError(
                f"{self.info.name} with weight_source=pretrained needs --set reference=RUN, a training run that has "
                "not seen the clients' windows; or use weight_source=warmup"
            )
        network = read_run(Path(self.reference)).model
        sees, needed = [(m.spec.channels, m.spec.window) for m in (network, model)]
        if sees != needed:
            raise ConfigError(
                f"the reference of {self.info.name} sees (channels, window) {sees}, the model {needed}"
            )
        return network.to(next(model.parameters()).device)
