"""Local training: nobody sends anything. The baseline that every federated strategy has to beat.

Source: ours; "Base" of specs/federated.md section 22.
"""

from dataclasses import dataclass
from typing import ClassVar

from wearfleet_cloud.federated.base import LEARNED_ROLES, AveragingStrategy, StrategyInfo

__all__ = ["LocalOnly"]


@dataclass(frozen=True, slots=True)
class LocalOnly(AveragingStrategy):
    """Local epochs that go on where the last round ended; the server counts who took part."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="local",
        paper="none; baseline",
        uploaded=(),
        kept_local=LEARNED_ROLES,
        composes_with=("downlink", "async", "partial_participation"),
    )
