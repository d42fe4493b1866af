"""FedAdagrad: the server's step shrinks with the sum of all squared mean differences so far.

Source: Reddi et al. 2021, arXiv:2003.00295, algorithm 2 (FedAdagrad).
Differs: clients send differences and count by their windows; statistics of normalisation are pooled, not optimised.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wearfleet_cloud.federated.base import StrategyInfo
from wearfleet_cloud.federated.server_optimiser import (
    AdaptiveRule,
    ServerOptimised,
    ServerRule,
    check_adaptive,
)

__all__ = ["FedAdagrad"]


@dataclass(frozen=True, slots=True)
class FedAdagrad(ServerOptimised):
    """FedAvg with Adagrad on the server.

    Args:
        server_learning_rate: factor of the step, above 0.
        beta1: decay of the first moment.
        tau: adaptivity, above 0; tune it first.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedadagrad",
        paper="Reddi et al. 2021, arXiv:2003.00295",
        hyper_parameters={
            "server_learning_rate": "factor of the server's step, above 0",
            "beta1": "decay of the server's first moment",
            "tau": "adaptivity: the larger, the nearer to FedAvgM; above 0",
        },
    )
    server_learning_rate: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3

    def __post_init__(self) -> None:
        check_adaptive(
            "FedAdagrad", beta1=self.beta1, tau=self.tau, server_learning_rate=self.server_learning_rate
        )

    def rule(self) -> ServerRule:
        """The step rate m / (sqrt(v) + tau) with v the sum of squares; see ``AdaptiveRule``."""
        return AdaptiveRule(self.server_learning_rate, self.beta1, self.tau, _second)


def _second(v: NDArray[Any], square: NDArray[Any]) -> NDArray[Any]:
    """Next v <- v + d^2."""
    return np.asarray(v + square)
