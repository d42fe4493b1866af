"""FedPer: the body is averaged, every device keeps a head of its own; both are trained together.

Source: Arivazhagan et al. 2019, arXiv:1912.00818, algorithms 1 and 2.
Differs: the personal layers are the linear head (the paper keeps up to four more blocks); clients send differences and
count by their windows; statistics of normalisation belong to the body and are pooled.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from wearfleet_protos.tensors import TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Averaging, Contribution, average
from wearfleet_cloud.federated.base import StrategyInfo
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["FedPer"]


@dataclass(frozen=True, slots=True)
class FedPer:
    """Args: local: training of a client. averaging: weights of the clients."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedper",
        paper="Arivazhagan et al. 2019, arXiv:1912.00818",
        version=1,
        uploaded=(TensorRole.SHARED, TensorRole.NORM_AFFINE, TensorRole.NORM_STAT, TensorRole.COUNTER),
        kept_local=(TensorRole.HEAD,),
        phases=("evaluate_before", "train", "evaluate_after"),
        composes_with=("secagg", "central_dp", "robust", "compression", "async", "partial_participation"),
        hyper_parameters={},
    )
    local: LocalTraining = field(default_factory=LocalTraining)
    averaging: Averaging = field(default_factory=Averaging)

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local epochs on the received body and this device's own head."""
        from wearfleet_cloud.federated.client_program import local_program  # noqa: PLC0415  see FedAvg

        return local_program(model, self.local, keep_local=self.info.kept_local)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,  # noqa: ARG002 - it keeps nothing
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """The weighted mean of the bodies; the head stays as it was in the global model."""
        return average(specs, self.info.upload(), current, contributions, self.averaging)
