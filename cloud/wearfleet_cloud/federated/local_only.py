"""Local training: nobody sends anything. The baseline that every federated strategy has to beat.

Source: ours; "Base" of specs/federated.md section 22.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from wearfleet_protos.tensors import TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Contribution, average
from wearfleet_cloud.federated.base import LEARNED_ROLES, StrategyInfo
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["LocalOnly"]


@dataclass(frozen=True, slots=True)
class LocalOnly:
    """Args: local: training of a client."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="local",
        paper="none; baseline",
        version=1,
        uploaded=(),
        kept_local=LEARNED_ROLES,
        phases=("evaluate_before", "train", "evaluate_after"),
        composes_with=("async", "partial_participation"),
        hyper_parameters={},
    )
    local: LocalTraining = field(default_factory=LocalTraining)

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local epochs that go on where the last round ended."""
        from wearfleet_cloud.federated.client_program import local_program  # noqa: PLC0415  see FedAvg

        return local_program(model, self.local, keep_local=self.info.kept_local)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,  # noqa: ARG002 - it keeps nothing
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """Count who took part; the global tensors stay as they are."""
        return average(specs, self.info.upload(), current, contributions)
