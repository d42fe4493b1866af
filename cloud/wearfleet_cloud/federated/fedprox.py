"""FedProx: FedAvg with a pull of every local step towards the round's global model.

Source: Li et al. 2020, arXiv:1812.06127, equation 2: min f_i(y) + (mu / 2) ||y - x_t||^2.
Differs: the gradient mu (y - x_t) is added as it stands rather than differentiated from a norm; it covers all trained
parameters, those of normalisation layers too, and comes before an adaptive optimiser's moments. Form ``norm`` is for
parity with PersonalizedFL's code, whose term is (mu / 2) ||y - x_t||: a pull of the same strength at every distance,
which has no gradient at 0 and is left out there. (That code also leaves it out on the first batch of later epochs and
in its first round.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, ClassVar, Final

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.federated.base import AveragingStrategy, StrategyInfo

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram
    from wearfleet_cloud.federated.client_steps import GradientRule, Tensors

__all__ = ["FedProx", "pull"]


@dataclass(frozen=True, slots=True)
class FedProx(AveragingStrategy):
    """FedAvg with a proximal term.

    Args:
        mu: strength of the pull, >= 0; 0 is FedAvg.
        form: ``squared`` (the paper's) or ``norm``.

    Raises:
        ConfigError: mu is negative or not finite, or the form is unknown.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedprox",
        paper="Li et al. 2020, arXiv:1812.06127",
        hyper_parameters={
            "mu": "strength of the pull towards the global model, >= 0",
            "form": "squared (the paper's term) or norm (that of PersonalizedFL's code)",
        },
    )
    mu: float = 0.01
    form: str = "squared"

    def __post_init__(self) -> None:
        if not 0.0 <= self.mu < float("inf"):
            raise ConfigError(f"mu of FedProx must be at least 0, got {self.mu}")
        if self.form not in _RULES:
            raise ConfigError(f"form of FedProx must be {' or '.join(_RULES)}, got {self.form!r}")

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local epochs with the gradient of the proximal term; x_t is the copy taken at the start of the round."""
        from wearfleet_cloud.federated.client_program import anchor_specs, local_program  # noqa: PLC0415  see FedAvg

        return local_program(
            model,
            self.local,
            extra=anchor_specs(model),
            rule=_RULES[self.form],
            scalars=(("mu", self.mu),),
        )


def pull(grads: "Tensors", params: "Tensors", given: "Tensors") -> "Tensors":
    """Gradients g + mu (y - x_t): the rule of ``client_program.local_program`` with the scalar ``mu`` and anchors."""
    return {
        name: grad + given["mu"] * (params[name] - given["anchor/" + name]) for name, grad in grads.items()
    }


def _pull_by_norm(grads: "Tensors", params: "Tensors", given: "Tensors") -> "Tensors":
    """Gradients g + (mu / 2) (y - x_t) / ||y - x_t||, and g where y is x_t."""
    away = {name: params[name] - given["anchor/" + name] for name in grads}
    square = reduce(add, ((part * part).sum() for part in away.values()))
    strength = 0.5 * given["mu"] * (square > 0.0) * (square + (square <= 0.0)).rsqrt()
    return {name: grad + strength * away[name] for name, grad in grads.items()}


_RULES: Final[Mapping[str, "GradientRule"]] = {"squared": pull, "norm": _pull_by_norm}
