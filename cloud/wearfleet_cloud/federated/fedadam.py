"""FedAdam: the server takes the mean difference of a round as a gradient and makes a step of Adam.

Source: Reddi et al. 2021, arXiv:2003.00295, algorithm 2 (FedAdam).
Differs: clients send differences and count by their windows; the correction of the moments' start is an option (the
paper has none); statistics of normalisation are pooled, not optimised.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray

from wearfleet_cloud.federated.base import StrategyInfo
from wearfleet_cloud.federated.server_optimiser import TWO_MOMENTS, TwoMoments

__all__ = ["FedAdam"]


@dataclass(frozen=True, slots=True)
class FedAdam(TwoMoments):
    """FedAvg with Adam on the server."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedadam", paper="Reddi et al. 2021, arXiv:2003.00295", hyper_parameters=TWO_MOMENTS
    )

    def second(self, v: NDArray[Any], square: NDArray[Any]) -> NDArray[Any]:
        """Next v: beta2 v + (1 - beta2) d^2."""
        return self.beta2 * v + (1.0 - self.beta2) * square
