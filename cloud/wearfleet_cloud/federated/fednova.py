"""FedNova: clients may make different numbers of steps; what each moved is divided by how far its solver goes.

Source: Wang et al. 2020, arXiv:2007.07481, equations 6 and 9 to 11; a_i in sections 4.1 and 4.2.
Differs: clients send Delta_i = -a_i d_i and how many steps they made, the server divides; tau_eff is sum_i p_i a_i for
every solver (the authors' code takes sum_i p_i K_i for the proximal one), so that equal steps are FedAvg; statistics of
normalisation are pooled rather than dropped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, ClassVar

from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.tensors import TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Contribution
from wearfleet_cloud.federated.base import ADDITIONS, AveragingStrategy, StrategyInfo
from wearfleet_cloud.federated.fedprox import pull
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["FedNova", "solver_length"]


@dataclass(frozen=True, slots=True)
class FedNova(AveragingStrategy):
    """Normalised averaging.

    Args:
        mu: pull of every local step towards the global model, as in FedProx; 0 for none.
        local: training of a client: SGD, with momentum only if ``mu`` is 0.
        averaging: weights of the clients.

    Raises:
        ConfigError: mu is out of range, or the local solver has no known length.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fednova",
        paper="Wang et al. 2020, arXiv:2007.07481",
        composes_with=tuple(a for a in ADDITIONS if a not in ("secagg", "central_dp", "local_dp", "async")),
        hyper_parameters={"mu": "strength of the pull towards the global model, >= 0"},
    )
    mu: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.mu < float("inf") or self.mu * self.local.learning_rate >= 1.0:
            raise ConfigError(
                f"mu of FedNova must be at least 0 and mu times the learning rate below 1, got {self.mu} and "
                f"{self.local.learning_rate}"
            )
        if self.local.optimiser != "sgd" or (self.mu and self.local.momentum):
            raise ConfigError(
                "FedNova knows the length of SGD, of SGD with momentum, and of SGD with mu; choose one of them "
                f"(got {self.local.optimiser}, momentum {self.local.momentum}, mu {self.mu})"
            )

    def client(self, model: "Classifier") -> "ClientProgram":
        """As FedAvg, or as FedProx when there is a pull."""
        from wearfleet_cloud.federated.client_program import anchor_specs, local_program  # noqa: PLC0415  see FedAvg

        if not self.mu:
            return local_program(model, self.local)
        extra = anchor_specs(model)
        return local_program(model, self.local, extra=extra, rule=pull, scalars=(("mu", self.mu),))

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """Fold with x <- x + tau_eff sum_i p_i Delta_i / a_i, tau_eff = sum_i p_i a_i; who made no step is left out.

        With a robust rule tau_eff is the median of a_i: how many steps and windows it had is what a client says.

        Raises:
            AggregationError: nobody made a step, or as ``Averaging.combine``.
        """
        moved = [c for c in contributions if c.num_steps > 0]
        if not moved:
            raise AggregationError("no client made a step; the round must be skipped and the old model kept")
        lengths = [solver_length(c.num_steps, self.local, self.mu) for c in moved]
        weights = [c.num_examples if self.averaging.weighting == "examples" else 1 for c in moved]
        effective = sum(w * a for w, a in zip(weights, lengths, strict=True)) / sum(weights)
        if self.averaging.addition:
            effective = median(lengths)
        scaled = [replace(c, scale=effective / a) for c, a in zip(moved, lengths, strict=True)]
        return AveragingStrategy.server(self, specs, current, state, scaled)


def solver_length(steps: int, local: LocalTraining, mu: float) -> float:
    """How far K local steps go along a constant gradient, in units of the learning rate: a_i = ||coefficients||_1.

    SGD: K. Momentum r: (K - r (1 - r^K) / (1 - r)) / (1 - r). Pull mu at rate e: (1 - (1 - e mu)^K) / (e mu).

    Args:
        steps: K, at least 1.
        local: SGD.
        mu: of the pull; 0 for none.
    """
    if mu:
        shrink = local.learning_rate * mu
        return float((1.0 - (1.0 - shrink) ** steps) / shrink)
    kept = local.momentum
    return float((steps - kept * (1.0 - kept**steps) / (1.0 - kept)) / (1.0 - kept))
