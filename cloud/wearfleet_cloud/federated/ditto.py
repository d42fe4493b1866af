"""Ditto: beside the global model every device trains one of its own, which is pulled towards the global one.

Source: Li et al. 2021, arXiv:2012.04221, algorithm 1 (solver: FedAvg).
Differs: the device trains the global model first and its own after it, from the same received x_t; statistics of
normalisation of the own model are its own and are not pulled; clients send differences and count by their windows.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.federated.base import AveragingStrategy, StrategyInfo
from wearfleet_cloud.federated.fedprox import pull
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["Ditto"]


@dataclass(frozen=True, slots=True)
class Ditto(AveragingStrategy):
    """A global and a personal track.

    Args:
        pull: lambda, strength of the pull of the personal model towards the received one, >= 0; 0 is local training.
        personal_epochs: passes over the client's windows for the personal model.
        personal_learning_rate: of its steps, > 0.
        local: training of the global track; optimiser, momentum and batch are those of the personal one too.
        averaging: weights of the clients.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="ditto",
        paper="Li et al. 2021, arXiv:2012.04221",
        phases=("evaluate_before", "train", "train_personal", "evaluate_after"),
        hyper_parameters={
            "pull": "lambda: strength of the personal model's pull towards the received one, >= 0",
            "personal_epochs": "passes over the windows for the personal model, >= 1",
            "personal_learning_rate": "of the personal model's steps, above 0",
        },
        kept_beside=("a personal model",),
    )
    pull: float = 0.1
    personal_epochs: int = 1
    personal_learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 <= self.pull < float("inf"):
            raise ConfigError(f"pull of Ditto must be at least 0, got {self.pull}")
        if self.personal_epochs < 1:
            raise ConfigError(f"personal_epochs of Ditto must be at least 1, got {self.personal_epochs}")
        self._personal_training()

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local epochs on the global model, then v <- v - rate (gradient + lambda (v - x_t)).

        The held-out part is measured with the received model before, and with the personal one after.
        """
        from wearfleet_cloud.federated.client_program import (  # noqa: PLC0415  see FedAvg
            anchor_specs,
            measured,
            model_specs,
            personal_phase,
            personal_specs,
            training_phase,
        )

        train, slots = training_phase(model, self.local)
        own, own_slots = personal_phase(
            model, self._personal_training(), name="train_personal", rule=pull, scalars=(("mu", self.pull),)
        )
        specs = (
            *model_specs(model),
            *slots,
            *anchor_specs(model),
            *personal_specs(model, "local"),
            *own_slots,
        )
        return measured(model, self.local, specs, (train, own), personal=True)

    def _personal_training(self) -> LocalTraining:
        return replace(self.local, epochs=self.personal_epochs, learning_rate=self.personal_learning_rate)
