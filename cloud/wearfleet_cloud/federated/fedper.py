"""FedPer: the body is averaged, every device keeps a head of its own; both are trained together.

Source: Arivazhagan et al. 2019, arXiv:1912.00818, algorithms 1 and 2.
Differs: the personal layers are the linear head (the paper keeps up to four more blocks); clients send differences and
count by their windows; statistics of normalisation belong to the body and are pooled.
"""

from dataclasses import dataclass
from typing import ClassVar

from wearfleet_protos.tensors import TensorRole

from wearfleet_cloud.federated.base import AveragingStrategy, StrategyInfo

__all__ = ["FedPer"]


@dataclass(frozen=True, slots=True)
class FedPer(AveragingStrategy):
    """A body in common, a head of one's own."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedper",
        paper="Arivazhagan et al. 2019, arXiv:1912.00818",
        uploaded=(TensorRole.SHARED, TensorRole.NORM_AFFINE, TensorRole.NORM_STAT, TensorRole.COUNTER),
        kept_local=(TensorRole.HEAD,),
    )
