"""FedBN: everything is averaged but the normalisation layers, which each device keeps.

Source: Li et al. 2021, arXiv:2102.07623, algorithm 1.
Differs: normalisation layers are found by their declared role, not by name; a model without batch normalisation is
refused, because it would silently be FedAvg.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole

from wearfleet_cloud.federated.base import AveragingStrategy, StrategyInfo

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["FedBN"]


@dataclass(frozen=True, slots=True)
class FedBN(AveragingStrategy):
    """FedAvg with normalisation of one's own."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedbn",
        paper="Li et al. 2021, arXiv:2102.07623",
        uploaded=(TensorRole.SHARED, TensorRole.HEAD),
        kept_local=(TensorRole.NORM_AFFINE, TensorRole.NORM_STAT, TensorRole.COUNTER),
    )

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
