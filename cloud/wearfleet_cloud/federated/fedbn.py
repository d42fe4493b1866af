"""FedBN: everything is averaged but the normalisation layers, which each device keeps.

Source: Li et al. 2021, arXiv:2102.07623, algorithm 1.
Differs: normalisation layers are found by their declared role, not by name; a model without batch normalisation is
refused, because it would silently be FedAvg.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Averaging, Contribution, average
from wearfleet_cloud.federated.base import StrategyInfo
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["FedBN"]


@dataclass(frozen=True, slots=True)
class FedBN:
    """Args: local: training of a client. averaging: weights of the clients."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedbn",
        paper="Li et al. 2021, arXiv:2102.07623",
        version=1,
        uploaded=(TensorRole.SHARED, TensorRole.HEAD),
        kept_local=(TensorRole.NORM_AFFINE, TensorRole.NORM_STAT, TensorRole.COUNTER),
        phases=("evaluate_before", "train", "evaluate_after"),
        composes_with=("secagg", "central_dp", "robust", "compression", "async", "partial_participation"),
        hyper_parameters={},
    )
    local: LocalTraining = field(default_factory=LocalTraining)
    averaging: Averaging = field(default_factory=Averaging)

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local epochs; normalisation starts from what this device had after its last round.

        Raises:
            ConfigError: the model has no running statistics.
        """
        from wearfleet_cloud.federated.client_program import local_program  # noqa: PLC0415  see FedAvg

        program = local_program(model, self.local, keep_local=self.info.kept_local)
        if not any(spec.role == TensorRole.NORM_STAT for spec in program.tensors):
            raise ConfigError(
                f"FedBN needs a model with batch normalisation; this {model.spec.backbone} has none, so nothing would "
                "be personal. Use FedAvg, or the cnn backbone"
            )
        return program

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,  # noqa: ARG002 - it keeps nothing
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """The weighted mean of all but normalisation, which stays as it was in the global model."""
        return average(specs, self.info.upload(), current, contributions, self.averaging)
