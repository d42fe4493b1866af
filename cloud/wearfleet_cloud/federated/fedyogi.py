"""FedYogi: FedAdam whose second moment moves by a bounded amount a round.

Source: Reddi et al. 2021, arXiv:2003.00295, algorithm 2 (FedYogi).
Differs: as ``fedadam``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wearfleet_cloud.federated.base import StrategyInfo
from wearfleet_cloud.federated.server_optimiser import TWO_MOMENTS, TwoMoments

__all__ = ["FedYogi"]


@dataclass(frozen=True, slots=True)
class FedYogi(TwoMoments):
    """FedAvg with Yogi on the server."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedyogi", paper="Reddi et al. 2021, arXiv:2003.00295", hyper_parameters=TWO_MOMENTS
    )
    server_learning_rate: float = 0.01

    def second(self, v: NDArray[Any], square: NDArray[Any]) -> NDArray[Any]:
        """Next v: v - (1 - beta2) d^2 sign(v - d^2)."""
        return np.asarray(v - (1.0 - self.beta2) * square * np.sign(v - square))
