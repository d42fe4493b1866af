"""A server optimiser: the mean difference of a round is a gradient, and a rule with moments makes the step.

What FedAvgM, FedAdagrad, FedAdam and FedYogi share. The rule touches trained parameters only (SHARED, NORM_AFFINE,
HEAD); statistics of normalisation are pooled as moments, because a variance that an optimiser moves can turn negative.

Source: Reddi et al. 2021, arXiv:2003.00295, algorithms 1 and 2; specs/federated.md section 10.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Contribution, moved
from wearfleet_cloud.federated.base import AveragingStrategy

__all__ = [
    "TWO_MOMENTS",
    "AdaptiveRule",
    "ServerOptimised",
    "ServerRule",
    "TwoMoments",
    "check_adaptive",
    "check_positive",
]

Array = NDArray[Any]

_OPTIMISED: Final = (TensorRole.SHARED, TensorRole.NORM_AFFINE, TensorRole.HEAD)
_COUNT: Final = "aggregations"

TWO_MOMENTS: Final[Mapping[str, str]] = {
    "server_learning_rate": "factor of the server's step, above 0",
    "beta1": "decay of the server's first moment",
    "beta2": "decay of the server's second moment",
    "tau": "adaptivity: the larger, the nearer to FedAvgM; above 0",
    "bias_correction": "on or off: correct the moments for their start, by the number of aggregations",
}
"""Hyper-parameters of ``TwoMoments``, in words."""


class ServerRule(Protocol):
    """One step of a server optimiser on one tensor, in float64."""

    def start(self) -> Mapping[str, float]:
        """First value of every moment, by name."""

    def step(self, delta: Array, moments: Mapping[str, Array], count: int) -> tuple[Array, dict[str, Array]]:
        """The step and the moments after it.

        Args:
            delta: mean difference of the clients.
            moments: of the same shape, from the aggregation before.
            count: aggregations with this one, from 1; a skipped round is none.
        """


@dataclass(frozen=True, slots=True)
class ServerOptimised(AveragingStrategy, ABC):
    """FedAvg whose mean difference is a server optimiser's gradient.

    Its state: the moments (float64, ``<moment>/<tensor>``) and the number of aggregations.
    """

    @abstractmethod
    def rule(self) -> ServerRule:
        """The optimiser."""

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """Fold with x <- x + the rule's step on the mean of the clients' differences."""
        upload, rule = self.info.upload(), self.rule()
        mean = self.averaging.combine(specs, upload, current, contributions)
        tensors = moved(current, mean, upload)
        count = int(state.get(_COUNT, np.int64(0))) + 1
        after: dict[str, NDArray[np.generic]] = {_COUNT: np.asarray(count, np.int64)}
        for spec in specs:
            if spec.name not in mean.values or spec.role not in _OPTIMISED:
                continue
            before = {
                moment: state.get(f"{moment}/{spec.name}", np.full(spec.shape, first, np.float64))
                for moment, first in rule.start().items()
            }
            step, moments = rule.step(mean.values[spec.name], before, count)
            tensors[spec.name] = np.asarray(current[spec.name] + step).astype(current[spec.name].dtype)
            after |= {f"{moment}/{spec.name}": value for moment, value in moments.items()}
        return Averaged(tensors, mean, after)


@dataclass(frozen=True, slots=True)
class TwoMoments(ServerOptimised):
    """What FedAdam and FedYogi share: two decaying moments.

    Args:
        server_learning_rate: factor of the step, above 0.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        tau: adaptivity, above 0; tune it first.
        bias_correction: "on" or "off"; on, the rate is corrected for the start of the moments.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    server_learning_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    bias_correction: str = "off"

    def __post_init__(self) -> None:
        check_adaptive(
            self.info.name,
            beta1=self.beta1,
            beta2=self.beta2,
            tau=self.tau,
            server_learning_rate=self.server_learning_rate,
        )
        if self.bias_correction not in ("on", "off"):
            raise ConfigError(
                f"bias_correction of {self.info.name} must be on or off, got {self.bias_correction!r}"
            )

    def rule(self) -> ServerRule:
        """The step rate m / (sqrt(v) + tau); see ``AdaptiveRule``."""
        corrected = self.beta2 if self.bias_correction == "on" else None
        return AdaptiveRule(self.server_learning_rate, self.beta1, self.tau, self.second, corrected)

    @abstractmethod
    def second(self, v: Array, square: Array) -> Array:
        """The next second moment, from the present one and the squared mean difference."""


@dataclass(frozen=True, slots=True)
class AdaptiveRule:
    """m <- beta1 m + (1 - beta1) d;  v <- second(v, d^2);  step = rate m / (sqrt(v) + tau), from m = 0, v = tau^2.

    Args:
        rate: of the server.
        beta1: decay of the first moment.
        tau: adaptivity, above 0.
        second: rule of the second moment.
        beta2: decay of the second moment, for the correction; None corrects nothing. Corrected, the rate of the k-th
            aggregation is multiplied by sqrt(1 - beta2^k) / (1 - beta1^k).
    """

    rate: float
    beta1: float
    tau: float
    second: Callable[[Array, Array], Array]
    beta2: float | None = None

    def start(self) -> Mapping[str, float]:
        """As ``ServerRule.start``."""
        return {"m": 0.0, "v": self.tau**2}

    def step(self, delta: Array, moments: Mapping[str, Array], count: int) -> tuple[Array, dict[str, Array]]:
        """As ``ServerRule.step``."""
        m = self.beta1 * moments["m"] + (1.0 - self.beta1) * delta
        v = self.second(moments["v"], delta * delta)
        rate = self.rate
        if self.beta2 is not None:
            rate *= math.sqrt(1.0 - self.beta2**count) / (1.0 - self.beta1**count)
        return rate * m / (np.sqrt(v) + self.tau), {"m": m, "v": v}


def check_positive(strategy: str, **values: float) -> None:
    """Refuse a value that is not above 0 and finite.

    Raises:
        ConfigError: names it.
    """
    for name, value in values.items():
        if not 0.0 < value < float("inf"):
            raise ConfigError(f"{name} of {strategy} must be above 0, got {value}")


def check_adaptive(
    strategy: str, *, beta1: float, tau: float, server_learning_rate: float, beta2: float = 0.0
) -> None:
    """Refuse hyper-parameters of an adaptive rule that are out of range.

    Raises:
        ConfigError: names the first one.
    """
    check_positive(strategy, tau=tau, server_learning_rate=server_learning_rate)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= value < 1.0:
            raise ConfigError(f"{name} of {strategy} must be at least 0 and below 1, got {value}")
