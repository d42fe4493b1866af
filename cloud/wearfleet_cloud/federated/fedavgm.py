"""FedAvgM: the server moves on with momentum.

Source: Reddi et al. 2021, arXiv:2003.00295, algorithm 1 with SGD and momentum on the server (Hsu et al.
2019, arXiv:1909.06335).
Differs: clients send differences and count by their windows; statistics of normalisation are pooled, not moved by
momentum; no Nesterov form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.federated.base import StrategyInfo
from wearfleet_cloud.federated.server_optimiser import ServerOptimised, ServerRule, check_positive

__all__ = ["FedAvgM"]


@dataclass(frozen=True, slots=True)
class FedAvgM(ServerOptimised):
    """FedAvg with heavy-ball momentum on the server.

    Args:
        server_learning_rate: factor of the step, above 0; 1 without momentum is FedAvg.
        server_momentum: at least 0 and below 1.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedavgm",
        paper="Reddi et al. 2021, arXiv:2003.00295",
        hyper_parameters={
            "server_learning_rate": "factor of the server's step, above 0",
            "server_momentum": "share of the last step that the server keeps, at least 0 and below 1",
        },
    )
    server_learning_rate: float = 1.0
    server_momentum: float = 0.9

    def __post_init__(self) -> None:
        check_positive("FedAvgM", server_learning_rate=self.server_learning_rate)
        if not 0.0 <= self.server_momentum < 1.0:
            raise ConfigError(
                f"server_momentum of FedAvgM must be at least 0 and below 1, got {self.server_momentum}"
            )

    def rule(self) -> ServerRule:
        """First u <- momentum u + mean difference, then x <- x + rate u."""
        return _Momentum(self.server_learning_rate, self.server_momentum)


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
