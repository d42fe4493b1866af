"""FedAdagrad: the server's step shrinks with the sum of all squared mean differences so far.

Source: Reddi et al. 2021, arXiv:2003.00295, algorithm 2 (FedAdagrad).
Differs: clients send differences and count by their windows; statistics of normalisation are pooled, not optimised.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.tensors import TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Averaging, Contribution
from wearfleet_cloud.federated.base import LEARNED_ROLES, StrategyInfo
from wearfleet_cloud.federated.server_optimiser import AdaptiveRule, check_adaptive, optimise
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["FedAdagrad"]


@dataclass(frozen=True, slots=True)
class FedAdagrad:
    """FedAvg with Adagrad on the server.

    Args:
        server_learning_rate: factor of the step, above 0.
        beta1: decay of the first moment.
        tau: adaptivity, above 0; tune it first.
        local: training of a client.
        averaging: weights of the clients.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedadagrad",
        paper="Reddi et al. 2021, arXiv:2003.00295",
        version=1,
        uploaded=LEARNED_ROLES,
        kept_local=(),
        phases=("evaluate_before", "train", "evaluate_after"),
        composes_with=("secagg", "central_dp", "robust", "compression", "async", "partial_participation"),
        hyper_parameters={
            "server_learning_rate": "factor of the server's step, above 0",
            "beta1": "decay of the server's first moment",
            "tau": "adaptivity: the larger, the nearer to FedAvgM; above 0",
        },
    )
    server_learning_rate: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3
    local: LocalTraining = field(default_factory=LocalTraining)
    averaging: Averaging = field(default_factory=Averaging)

    def __post_init__(self) -> None:
        check_adaptive(
            "FedAdagrad", beta1=self.beta1, tau=self.tau, server_learning_rate=self.server_learning_rate
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
        """Fold with x <- x + rate m / (sqrt(v) + tau) with v the sum of squares; see ``AdaptiveRule``."""
        return optimise(
            specs,
            self.info.upload(),
            current,
            state,
            contributions,
            averaging=self.averaging,
            rule=AdaptiveRule(self.server_learning_rate, self.beta1, self.tau, _second),
        )


def _second(v: NDArray[Any], square: NDArray[Any]) -> NDArray[Any]:
    """Next v <- v + d^2."""
    return np.asarray(v + square)
