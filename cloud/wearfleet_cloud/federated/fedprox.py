"""FedProx: FedAvg with a pull of every local step towards the round's global model.

Source: Li et al. 2020, arXiv:1812.06127, equation 2: min f_i(y) + (mu / 2) ||y - x_t||^2.
Differs: the gradient mu (y - x_t) is added as it stands rather than differentiated from a norm; it covers all trained
parameters, those of normalisation layers too, and comes before an adaptive optimiser's moments. (PersonalizedFL's code
uses the norm, not its square.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Averaging, Contribution, average
from wearfleet_cloud.federated.base import LEARNED_ROLES, StrategyInfo
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from torch import Tensor
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["FedProx"]


@dataclass(frozen=True, slots=True)
class FedProx:
    """FedAvg with a proximal term.

    Args:
        mu: strength of the pull, >= 0; 0 is FedAvg.
        local: training of a client.
        averaging: weights of the clients.

    Raises:
        ConfigError: mu is negative or not finite.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedprox",
        paper="Li et al. 2020, arXiv:1812.06127",
        version=1,
        uploaded=LEARNED_ROLES,
        kept_local=(),
        phases=("evaluate_before", "train", "evaluate_after"),
        composes_with=("secagg", "central_dp", "robust", "compression", "async", "partial_participation"),
        hyper_parameters={"mu": "strength of the pull towards the global model, >= 0"},
    )
    mu: float = 0.01
    local: LocalTraining = field(default_factory=LocalTraining)
    averaging: Averaging = field(default_factory=Averaging)

    def __post_init__(self) -> None:
        if not 0.0 <= self.mu < float("inf"):
            raise ConfigError(f"mu of FedProx must be at least 0, got {self.mu}")

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local epochs with g <- g + mu (y - x_t); x_t is the copy taken at the start of the round."""
        from wearfleet_cloud.federated.client_program import anchor_specs, local_program  # noqa: PLC0415  see FedAvg

        return local_program(
            model,
            self.local,
            extra=anchor_specs(model),
            rule=_pull,
            scalars=(("mu", self.mu),),
        )

    def server(
        self, specs: Sequence[TensorSpec], current: Arrays, contributions: Iterable[Contribution]
    ) -> Averaged:
        """As FedAvg; a client that ran out of time sends what it has."""
        return average(specs, self.info.upload(), current, contributions, self.averaging)


def _pull(
    grads: dict[str, "Tensor"], params: dict[str, "Tensor"], given: dict[str, "Tensor"]
) -> dict[str, "Tensor"]:
    return {
        name: grad + given["mu"] * (params[name] - given["anchor/" + name]) for name, grad in grads.items()
    }
