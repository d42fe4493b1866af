"""FedAvg: train everywhere, average everything, weighted by the number of windows.

Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.
Differs: clients send differences; variances of normalisation are pooled as moments (specs/federated.md 0.4); the
optimiser starts afresh each round.
"""

from dataclasses import dataclass
from typing import ClassVar

from wearfleet_cloud.federated.base import AveragingStrategy, StrategyInfo

__all__ = ["FedAvg"]


@dataclass(frozen=True, slots=True)
class FedAvg(AveragingStrategy):
    """Local epochs, then the weighted mean of everything."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedavg",
        paper="McMahan et al. 2017, arXiv:1602.05629",
    )
