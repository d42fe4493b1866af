"""FedHealth 2: FedAP's predecessor and a preset of it, with FedHealth's fine-tuning as an option.

Source: Chen et al. 2021, arXiv:2106.01009 (abstract: similarities by a pre-trained model, weighted averages of all
models, normalisation of one's own); the fine-tuning is that of FedHealth, Chen et al. 2020, arXiv:1907.09173.
Differs: no code or table of the paper was found, so only its three ingredients are checked; see ``fedap`` and, for what
of the features is shared, ``coral``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Contribution
from wearfleet_cloud.federated.base import StrategyInfo
from wearfleet_cloud.federated.client_models import ClientModels
from wearfleet_cloud.federated.fedap import FedAP
from wearfleet_cloud.federated.server_optimiser import check_positive
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["FedHealth2"]

_PROJECTED: Final = "projected/"
_SHARED: Final = "shared_covariance"
"""As in ``coral``, which needs torch."""


@dataclass(frozen=True, slots=True)
class FedHealth2(FedAP):
    """FedAP by a reference network; with ``coral_finetune`` a personal track too.

    Args:
        personalise: ``none`` or ``coral_finetune``.
        coral_weight: of the alignment, above 0.
        finetune_epochs: at least 1.
        finetune_learning_rate: of plain SGD, above 0.

    Raises:
        ConfigError: an option is out of range.
    """

    info: ClassVar[StrategyInfo] = replace(
        FedAP.info,
        name="fedhealth2",
        paper="Chen et al. 2021, arXiv:2106.01009",
        hyper_parameters={
            **FedAP.info.hyper_parameters,
            "personalise": "none, or coral_finetune: tune the last layers of a personal model towards the covariance "
            "of all clients' projected features",
            "coral_weight": "of that alignment, above 0",
            "finetune_epochs": "passes over the windows for it, >= 1",
            "finetune_learning_rate": "of its steps, above 0",
        },
    )

    weight_source: str = "pretrained"
    personalise: str = "none"
    coral_weight: float = 0.01
    finetune_epochs: int = 1
    finetune_learning_rate: float = 0.01

    def __post_init__(self) -> None:
        FedAP.__post_init__(self)
        check_positive(
            "FedHealth 2",
            coral_weight=self.coral_weight,
            finetune_learning_rate=self.finetune_learning_rate,
            finetune_epochs=self.finetune_epochs,
        )
        if self.personalise not in ("none", "coral_finetune"):
            raise ConfigError(
                f"personalise of FedHealth 2 must be none or coral_finetune, got {self.personalise!r}"
            )

    def client(self, model: "Classifier") -> "ClientProgram":
        """As FedAP; if wished, then the covariance of projected features, and the fine-tuning of a personal track."""
        program = FedAP.client(self, model)
        if self.personalise == "none":
            return program
        from wearfleet_cloud.federated.client_program import measured  # noqa: PLC0415  see FedAvg
        from wearfleet_cloud.federated.coral import finetuning_phase, projected_phase  # noqa: PLC0415

        project, sent, counter = projected_phase(model, self.local)
        tuning = LocalTraining(
            learning_rate=self.finetune_learning_rate,
            batch_size=self.local.batch_size,
            epochs=self.finetune_epochs,
        )
        finetune, needed = finetuning_phase(model, tuning, self.coral_weight)
        tensors = (*program.tensors, *sent, *counter, *needed)
        return measured(model, self.local, tensors, (*program.phases[1:-1], project, finetune), personal=True)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """As FedAP; the shared covariance is that of all clients' features together, by their windows."""
        averaged = FedAP.server(self, specs, current, state, contributions)
        if self.personalise == "none":
            return averaged
        models = ClientModels.from_state(averaged.state)
        pooled = _pooled_covariance(models).astype(current[_SHARED].dtype)
        return replace(averaged, tensors={**averaged.tensors, _SHARED: pooled})

    def renews(self, feature: str, aggregation: int) -> bool:
        """Covariances always; statistics as in FedAP."""
        return feature.startswith(_PROJECTED) or FedAP.renews(self, feature, aggregation)

    def distances(self, features: Arrays) -> NDArray[Any]:
        """By the statistics alone."""
        return FedAP.distances(self, _statistics(features))

    def fault(self, features: Arrays) -> str:
        """As FedAP."""
        return FedAP.fault(self, _statistics(features))


def _statistics(features: Arrays) -> Arrays:
    return {name: array for name, array in features.items() if not name.startswith(_PROJECTED)}


def _pooled_covariance(models: ClientModels) -> NDArray[np.float64]:
    """C = sum_i p_i (C_i + (m_i - m)(m_i - m)^T), m = sum_i p_i m_i, p_i by windows: as of all windows at once."""
    share = models.examples / models.examples.sum()
    means = models.features[_PROJECTED + "mean"].astype(np.float64)
    apart = means - share @ means
    within = np.tensordot(share, models.features[_PROJECTED + "covariance"].astype(np.float64), axes=1)
    return np.asarray(within + (apart * share[:, None]).T @ apart)
