"""FedRep: first the device's own head is trained on the frozen body, then the body under the frozen head.

Source: Collins et al. 2021, arXiv:2102.07078, algorithm 1.
Differs: while the head is trained the body is in evaluation mode, so that its statistics of normalisation stay as they
came; clients send differences and count by their windows (the paper weighs them equally); those statistics are pooled.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole

from wearfleet_cloud.federated.base import ADDITIONS, AveragingStrategy, StrategyInfo

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["FedRep"]


@dataclass(frozen=True, slots=True)
class FedRep(AveragingStrategy):
    """A body in common, a head of one's own, trained one after the other.

    Args:
        head_epochs: passes over the client's windows for the head; those of ``local`` are the body's.

    Raises:
        ConfigError: no epoch for the head.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedrep",
        paper="Collins et al. 2021, arXiv:2102.07078",
        uploaded=(TensorRole.SHARED, TensorRole.NORM_AFFINE, TensorRole.NORM_STAT, TensorRole.COUNTER),
        kept_local=(TensorRole.HEAD,),
        composes_with=tuple(a for a in ADDITIONS if a != "record_dp"),
        phases=("evaluate_before", "train_head", "train_body", "evaluate_after"),
        hyper_parameters={
            "head_epochs": "passes over the windows for the head, before those for the body; >= 1"
        },
    )
    head_epochs: int = 5

    def __post_init__(self) -> None:
        if self.head_epochs < 1:
            raise ConfigError(f"head_epochs of FedRep must be at least 1, got {self.head_epochs}")

    def client(self, model: "Classifier") -> "ClientProgram":
        """Epochs for the head on the received body, then epochs for the body."""
        from wearfleet_cloud.federated.client_program import (  # noqa: PLC0415  see FedAvg
            measured,
            model_specs,
            training_phase,
        )

        head, head_slots = training_phase(
            model, replace(self.local, epochs=self.head_epochs), name="train_head", roles=(TensorRole.HEAD,)
        )
        body, body_slots = training_phase(
            model, self.local, name="train_body", roles=(TensorRole.SHARED, TensorRole.NORM_AFFINE)
        )
        specs = model_specs(model, self.info.kept_local)
        return measured(model, self.local, (*specs, *head_slots, *body_slots), (head, body))
