"""FedBuff: no rounds to wait for; whenever a buffer of updates is full, they make a step, the stale ones a smaller one.

Source: Nguyen et al. 2022, arXiv:2106.06639, algorithm 1; weights by staleness: Xie et al. 2019, arXiv:1903.03934,
section 5.2; specs/federated.md section 20.
Differs: a client has at most one update in a buffer, so that fast devices do not dominate; normalisation statistics are
pooled from what clients have, not moved by differences from an old version; staleness 0 has weight 1, so that a buffer
of fresh updates is FedAvg with the same ``weighting``, to the bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Averaging, Contribution
from wearfleet_cloud.federated.base import ADDITIONS, AveragingStrategy, StrategyInfo
from wearfleet_cloud.federated.cohort import Buffering
from wearfleet_cloud.federated.server_optimiser import check_positive

__all__ = ["FedBuff", "rebased"]

_WEIGHTS: Final = ("polynomial", "constant", "hinge")
_NORMALISE: Final = ("count", "weights")


@dataclass(frozen=True, slots=True)
class FedBuff(AveragingStrategy):
    """Asynchronous averaging in buffers.

    Args:
        buffer_size: updates that make a new version.
        concurrency: clients at work at the same time; 0 for three times the buffer.
        max_staleness: versions that the model may have gone on since an update's start.
        server_learning_rate: factor of the step, above 0.
        staleness_weight: of an update s versions old: ``polynomial`` (1 + s)^-exponent, ``constant`` 1, or ``hinge``
            1 while s <= hinge_start, then 1 / (1 + hinge_slope (s - hinge_start)).
        exponent: of the polynomial, at least 0.
        hinge_start: at least 0.
        hinge_slope: at least 0.
        normalise: divide the weighted sum by the ``count`` of updates (the paper), or by the sum of their ``weights``.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedbuff",
        paper="Nguyen et al. 2022, arXiv:2106.06639",
        composes_with=tuple(
            a for a in ADDITIONS if a != "secagg"
        ),  # masks cancel among clients of one version
        hyper_parameters={
            "buffer_size": "updates that make a new version of the model",
            "concurrency": "clients at work at the same time; 0: three times buffer_size",
            "max_staleness": "most versions that the model may have gone on since an update's start",
            "server_learning_rate": "factor of the server's step, above 0",
            "staleness_weight": "polynomial, constant or hinge",
            "exponent": "of the polynomial (1 + s)^-exponent",
            "hinge_start": "staleness up to which hinge weighs 1",
            "hinge_slope": "of hinge beyond that",
            "normalise": "count or weights: what the weighted sum is divided by",
        },
    )
    averaging: Averaging = field(default_factory=lambda: Averaging(weighting="uniform"))
    buffer_size: int = 10
    concurrency: int = 0
    max_staleness: int = 10
    server_learning_rate: float = 1.0
    staleness_weight: str = "polynomial"
    exponent: float = 0.5
    hinge_start: int = 4
    hinge_slope: float = 10.0
    normalise: str = "count"

    def __post_init__(self) -> None:
        check_positive("FedBuff", server_learning_rate=self.server_learning_rate)
        for name, value, known in (
            ("staleness_weight", self.staleness_weight, _WEIGHTS),
            ("normalise", self.normalise, _NORMALISE),
        ):
            if value not in known:
                raise ConfigError(f"{name} of FedBuff must be one of {', '.join(known)}, got {value!r}")
        if not all(0.0 <= v < float("inf") for v in (self.exponent, self.hinge_start, self.hinge_slope)):
            raise ConfigError(
                "exponent, hinge_start and hinge_slope of FedBuff must be at least 0 and finite"
            )
        _ = self.buffering

    @property
    def buffering(self) -> Buffering:
        """Size, concurrency and staleness of its buffers."""
        return Buffering(self.buffer_size, self.concurrency or 3 * self.buffer_size, self.max_staleness)

    def alpha(self, staleness: int) -> float:
        """Weight of an update whose base is so many versions old; 1 for a fresh one."""
        if self.staleness_weight == "constant":
            return 1.0
        if self.staleness_weight == "hinge":
            return 1.0 / (1.0 + self.hinge_slope * max(0, staleness - self.hinge_start))
        return float((1.0 + staleness) ** -self.exponent)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """Fold with x <- x + rate sum_i p_i alpha(s_i) Delta_i; by ``weights`` divided by sum_i p_i alpha(s_i)."""
        buffer = list(contributions)
        counts = [c.num_examples if self.averaging.weighting == "examples" else 1 for c in buffer]
        weights = [self.alpha(c.staleness) for c in buffer]
        rate = self.server_learning_rate
        if self.normalise == "weights" and buffer:
            rate /= sum(n * w for n, w in zip(counts, weights, strict=True)) / sum(counts)
        scaled = [replace(c, scale=rate * w) for c, w in zip(buffer, weights, strict=True)]
        return AveragingStrategy.server(self, specs, current, state, scaled)


def rebased(
    update: Arrays, specs: Iterable[TensorSpec], base: Arrays, current: Arrays
) -> Mapping[str, NDArray[Any]]:
    """An update of an older version, its normalisation statistics as differences from the current one.

    A gradient may be added to a newer model, but a variance is not moved: the client's own mean and variance,
    base + difference, are what is pooled.

    Args:
        update: differences from ``base``.
        specs: the plan's tensors.
        base: tensors that the client started from.
        current: tensors that the update will be added to.
    """
    statistics = {s.name for s in specs if s.role == TensorRole.NORM_STAT}
    return {
        name: _from_current(array, base[name], current[name]) if name in statistics else array
        for name, array in update.items()
    }


def _from_current(array: NDArray[Any], base: NDArray[Any], current: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(base + array - current, array.dtype)
