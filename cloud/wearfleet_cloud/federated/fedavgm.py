"""FedAvgM: the server moves on with momentum.

Source: Reddi et al. 2021, arXiv:2003.00295, algorithm 1 with SGD and momentum on the server (Hsu et al.
2019, arXiv:1909.06335).
Differs: clients send differences and count by their windows; statistics of normalisation are pooled, not moved by
momentum; no Nesterov form.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Averaging, Contribution
from wearfleet_cloud.federated.base import LEARNED_ROLES, StrategyInfo
from wearfleet_cloud.federated.server_optimiser import check_positive, optimise
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["FedAvgM"]


@dataclass(frozen=True, slots=True)
class FedAvgM:
    """FedAvg with heavy-ball momentum on the server.

    Args:
        server_learning_rate: factor of the step, above 0; 1 without momentum is FedAvg.
        server_momentum: at least 0 and below 1.
        local: training of a client.
        averaging: weights of the clients.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedavgm",
        paper="Reddi et al. 2021, arXiv:2003.00295",
        version=1,
        uploaded=LEARNED_ROLES,
        kept_local=(),
        phases=("evaluate_before", "train", "evaluate_after"),
        composes_with=("secagg", "central_dp", "robust", "compression", "async", "partial_participation"),
        hyper_parameters={
            "server_learning_rate": "factor of the server's step, above 0",
            "server_momentum": "share of the last step that the server keeps, at least 0 and below 1",
        },
    )
    server_learning_rate: float = 1.0
    server_momentum: float = 0.9
    local: LocalTraining = field(default_factory=LocalTraining)
    averaging: Averaging = field(default_factory=Averaging)

    def __post_init__(self) -> None:
        check_positive("FedAvgM", server_learning_rate=self.server_learning_rate)
        if not 0.0 <= self.server_momentum < 1.0:
            raise ConfigError(
                f"server_momentum of FedAvgM must be at least 0 and below 1, got {self.server_momentum}"
            )

    def client(self, model: "Classifier") -> "ClientProgram":
        """As FedAvg."""
        from wearfleet_cloud.federated.client_program import local_program  # noqa: PLC0415  see FedAvg

        return local_program(model, self.local)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """Fold with u <- momentum u + mean difference;  x <- x + rate u."""
        return optimise(
            specs,
            self.info.upload(),
            current,
            state,
            contributions,
            averaging=self.averaging,
            rule=_Momentum(self.server_learning_rate, self.server_momentum),
        )


@dataclass(frozen=True, slots=True)
class _Momentum:
    rate: float
    momentum: float

    def start(self) -> Mapping[str, float]:
        return {"u": 0.0}

    def step(
        self,
        delta: NDArray[Any],
        moments: Mapping[str, NDArray[Any]],
        count: int,  # noqa: ARG002 - nothing is corrected
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        u = self.momentum * moments["u"] + delta
        return self.rate * u, {"u": u}
