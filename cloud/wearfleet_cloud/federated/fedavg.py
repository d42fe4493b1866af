"""FedAvg: train everywhere, average everything, weighted by the number of windows.

Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.
Differs: clients send differences; variances of normalisation are pooled as moments (specs/federated.md 0.4); the
optimiser starts afresh each round.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from wearfleet_protos.tensors import TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Averaging, Contribution, average
from wearfleet_cloud.federated.base import LEARNED_ROLES, StrategyInfo
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["FedAvg"]


@dataclass(frozen=True, slots=True)
class FedAvg:
    """Args: local: training of a client. averaging: weights of the clients."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedavg",
        paper="McMahan et al. 2017, arXiv:1602.05629",
        version=1,
        uploaded=LEARNED_ROLES,
        kept_local=(),
        phases=("evaluate_before", "train", "evaluate_after"),
        composes_with=("secagg", "central_dp", "robust", "compression", "async", "partial_participation"),
        hyper_parameters={},
    )
    local: LocalTraining = field(default_factory=LocalTraining)
    averaging: Averaging = field(default_factory=Averaging)

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local epochs on the cross-entropy; nothing stays behind."""
        from wearfleet_cloud.federated.client_program import local_program  # noqa: PLC0415  folding needs no torch

        return local_program(model, self.local)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,  # noqa: ARG002 - it keeps nothing
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """The weighted mean of what the clients have."""
        return average(specs, self.info.upload(), current, contributions, self.averaging)
