"""Per-FedAvg: the global model is trained to be good after one step on a device's own windows (MAML).

Source: Fallah et al. 2020, arXiv:2002.07948, algorithm 1, and the first-order and Hessian-free forms of section 5.
Differs: D, D' and D" are every second (or third) window of one larger batch; statistics of normalisation are committed
from the outer gradient alone; the outer step may be any local optimiser; clients send differences and count by their
windows (the paper weighs them equally).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.federated.base import ADDITIONS, AveragingStrategy, StrategyInfo
from wearfleet_cloud.federated.server_optimiser import check_positive
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from torch import Tensor
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram
    from wearfleet_cloud.federated.client_steps import Direction, Tensors

__all__ = ["PerFedAvg"]

_PARTS: Final = {"first_order": 2, "hessian_free": 3}


@dataclass(frozen=True, slots=True)
class PerFedAvg(AveragingStrategy):
    """Federated model-agnostic meta-learning.

    Args:
        form: ``first_order`` (2 gradients a step) or ``hessian_free`` (4).
        alpha: rate of the inner step, and of the steps that make the model personal; above 0.
        delta: distance of the finite difference of ``hessian_free``; above 0.
        adapt_steps: steps that make the model personal, at least 1.
        local: training of a client; its learning rate is the paper's beta, its batch the size of each of D, D', D".
        averaging: weights of the clients.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="perfedavg",
        paper="Fallah et al. 2020, arXiv:2002.07948",
        composes_with=tuple(a for a in ADDITIONS if a != "record_dp"),
        phases=("evaluate_before", "train", "adapt", "evaluate_after"),
        hyper_parameters={
            "form": "first_order (two gradients a step) or hessian_free (four)",
            "alpha": "rate of the inner step and of the steps that make the model personal, above 0",
            "delta": "distance of the finite difference of hessian_free, above 0",
            "adapt_steps": "steps that make the model personal, at least 1",
        },
    )
    form: str = "first_order"
    alpha: float = 0.01
    delta: float = 1e-3
    adapt_steps: int = 1

    def __post_init__(self) -> None:
        check_positive("Per-FedAvg", alpha=self.alpha, delta=self.delta)
        if self.form not in _PARTS:
            raise ConfigError(f"form of Per-FedAvg must be {' or '.join(_PARTS)}, got {self.form!r}")
        if self.adapt_steps < 1:
            raise ConfigError(f"adapt_steps of Per-FedAvg must be at least 1, got {self.adapt_steps}")

    def client(self, model: "Classifier") -> "ClientProgram":
        """Meta-steps on the global model; then, on a copy of the received one, the steps that make it personal.

        The held-out part is measured with the received model before, and with the personal one after.
        """
        from wearfleet_models.roles import tensor_specs  # noqa: PLC0415  see FedAvg

        from wearfleet_cloud.federated.client_program import (  # noqa: PLC0415
            ClientPhase,
            measured,
            model_specs,
            personal_phase,
            personal_specs,
        )
        from wearfleet_cloud.federated.client_steps import loss_gradient, optimising_step  # noqa: PLC0415

        specs, parts = tensor_specs(model), _PARTS[self.form]
        meta = _meta_gradient(loss_gradient(model, specs), parts)
        step, slots = optimising_step(specs, self.local.build(), meta)
        loop = replace(self.local.train_loop(), batch_size=parts * self.local.batch_size)
        rates = (("learning_rate", self.local.learning_rate), ("alpha", self.alpha))
        distance = (("delta", self.delta),) if self.form == "hessian_free" else ()
        adapt, adapt_slots = personal_phase(model, self._adaptation(), name="adapt")
        tensors = (*model_specs(model), *slots, *personal_specs(model, "copy"), *adapt_slots)
        train = ClientPhase("train", step, loop, (*rates, *distance))
        return measured(model, self.local, tensors, (train, adapt), personal=True)

    def _adaptation(self) -> LocalTraining:
        """Plain gradient steps, as many passes as they need."""
        return LocalTraining(
            learning_rate=self.alpha,
            batch_size=self.local.batch_size,
            epochs=self.adapt_steps,
            max_steps=self.adapt_steps,
        )


def _meta_gradient(gradient: "Direction", parts: int) -> "Direction":
    """Gradient of the loss after a step: g' = g(w - alpha g(w; D); D').

    With three parts less alpha h, h = [g(w + delta g'; D") - g(w - delta g'; D")] / (2 delta), the product of the
    Hessian at w with g'.
    """

    def direction(params: "Tensors", given: "Tensors") -> tuple["Tensors", "Tensors", "Tensors"]:
        batches = [_part(given, parts, index) for index in range(parts)]
        inner, _, _ = gradient(params, batches[0])
        adapted = _ahead(params, inner, -given["alpha"])
        outer, buffers, metrics = gradient(adapted, batches[1])
        if parts == _PARTS["first_order"]:
            return outer, buffers, metrics
        above, _, _ = gradient(_ahead(params, outer, given["delta"]), batches[2])
        below, _, _ = gradient(_ahead(params, outer, -given["delta"]), batches[2])
        scale = given["alpha"] / (2.0 * given["delta"])
        meta = {name: grad - scale * (above[name] - below[name]) for name, grad in outer.items()}
        return meta, buffers, metrics

    return direction


def _ahead(params: "Tensors", direction: "Tensors", distance: "Tensor") -> "Tensors":
    return {name: tensor + distance * direction[name] for name, tensor in params.items()}


def _part(given: "Tensors", parts: int, index: int) -> "Tensors":
    """Every ``parts``-th window of the batch, from ``index`` on; a short batch is shared out evenly."""
    own = {
        name: given[name].reshape(given[name].shape[0] // parts, parts, *given[name].shape[1:])[:, index]
        for name in ("x", "y", "weight")
    }
    return {**given, **own}
