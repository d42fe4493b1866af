"""SCAFFOLD: control variates take out of every local step what is peculiar to the client.

Source: Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1, option II.
Differs: statistics of normalisation have no control and are pooled; a client whose control is lost begins again at 0,
one that was away for long at c (specs/federated.md section 11);
N is the number of clients of the first aggregation, or more when more take part later (c is then rescaled), unless the
operator says it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.plan import Loop
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import (
    Arrays,
    Averaged,
    Averaging,
    Contribution,
    moved,
)
from wearfleet_cloud.federated.base import ADDITIONS, LEARNED_ROLES, AveragingStrategy, StrategyInfo
from wearfleet_cloud.federated.server_optimiser import check_positive
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientPhase, ClientProgram
    from wearfleet_cloud.federated.client_steps import Tensors

__all__ = ["Scaffold"]

_CONTROL: Final = "control/"
"""The server's control c: global, sent to every client."""
_OWN: Final = "own_control/"
"""The client's control c_i: stays on the device, 0 at first."""
_CHANGE: Final = "control_change/"
"""c_i after the round less c_i before it: uploaded."""
_STEPS: Final = "steps"
_ROUNDS: Final = "aggregations"
"""How many there were before this round: global."""
_SEEN: Final = "seen"
"""How many there were with the client's last one: stays on the device, 0 at first."""
_POPULATION: Final = "population"


@dataclass(frozen=True, slots=True)
class Scaffold(AveragingStrategy):
    """Stochastic controlled averaging.

    Args:
        server_learning_rate: factor of the mean difference, above 0.
        clients: N, all clients of the run; 0 for those of the first aggregation.
        control_rounds: a client that missed more aggregations than this begins with c_i = c, because its own control is
            about a model that is long gone; >= 1.
        local: training of a client: plain SGD, whose learning rate must not change in the run.
        averaging: the paper weighs clients equally.

    Raises:
        ConfigError: another local optimiser than plain SGD, or a number out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="scaffold",
        paper="Karimireddy et al. 2020, arXiv:1910.06378",
        uploaded=(*LEARNED_ROLES, TensorRole.AUX),
        phases=("evaluate_before", "drop_old_control", "train", "update_control", "evaluate_after"),
        composes_with=tuple(a for a in ADDITIONS if a not in ("robust", "async")),
        hyper_parameters={
            "server_learning_rate": "factor of the mean difference, above 0",
            "clients": "all clients of the run; 0 for as many as the first aggregation has",
            "control_rounds": "who missed more aggregations than this drops its control for the server's, >= 1",
        },
        kept_beside=("a control variate",),
        uploaded_groups=(TensorGroup.PARAM, TensorGroup.BUFFER, TensorGroup.AUX),
    )
    server_learning_rate: float = 1.0
    clients: int = 0
    control_rounds: int = 50
    local: LocalTraining = field(default_factory=LocalTraining)
    averaging: Averaging = field(default_factory=lambda: Averaging("uniform"))

    def __post_init__(self) -> None:
        check_positive("SCAFFOLD", server_learning_rate=self.server_learning_rate)
        if self.clients < 0:
            raise ConfigError(f"clients of SCAFFOLD must be at least 0, got {self.clients}")
        if self.control_rounds < 1:
            raise ConfigError(f"control_rounds of SCAFFOLD must be at least 1, got {self.control_rounds}")
        if self.local.optimiser != "sgd" or self.local.momentum or self.local.weight_decay:
            raise ConfigError(
                "SCAFFOLD needs plain SGD: with momentum, weight decay or Adam (x - y) / (K rate) is no mean gradient "
                f"(got {self.local.optimiser}, momentum {self.local.momentum}, decay {self.local.weight_decay})"
            )

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local steps y <- y - rate (g - c_i + c), then c_i <- c_i - c + (x - y) / (K rate)."""
        from wearfleet_cloud.federated.client_program import (  # noqa: PLC0415  see FedAvg
            anchor_specs,
            measured,
            model_specs,
            training_phase,
        )

        train, slots = training_phase(model, self.local, rule=_corrected)
        anchors = anchor_specs(model)
        controls = _control_specs(anchors)
        names = tuple(anchor.copy_of for anchor in anchors)
        step = train.step
        counted = replace(train, step=lambda given: {**step(given), _STEPS: given[_STEPS] + 1.0})
        specs = (*model_specs(model), *slots, *anchors, *controls)
        phases = (self._drop_old_control(names), counted, self._update_control(names))
        return measured(model, self.local, specs, phases)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """Fold with x <- x + rate mean Delta_i and c <- c + (m / N) mean (change of c_i), m clients of N.

        The global tensors hold c and the number of aggregations; the state holds N.

        Raises:
            AggregationError: as ``Averaging.combine``, or more clients than the operator said.
        """
        upload = self.info.upload()
        mean = self.averaging.combine(specs, upload, current, contributions)
        before, population = self._population(state, len(mean.clients))
        tensors = moved(current, mean, upload)
        share, kept = len(mean.clients) / population, before / population
        for spec in specs:
            if spec.copy_of and spec.name == f"anchor/{spec.copy_of}":
                name, control = spec.copy_of, _CONTROL + spec.copy_of
                tensors[name] = _moved(current[name], 1.0, self.server_learning_rate * mean.values[name])
                tensors[control] = _moved(current[control], kept, share * mean.values[_CHANGE + name])
        tensors[_ROUNDS] = np.asarray(float(current[_ROUNDS]) + 1.0, np.float32)
        return Averaged(tensors, mean, {_POPULATION: np.asarray(population, np.int64)})

    def _population(self, state: Arrays, clients: int) -> tuple[int, int]:
        """N of the aggregation before and of this one."""
        if self.clients:
            if clients > self.clients:
                raise AggregationError(
                    f"{clients} clients took part, SCAFFOLD was told there are {self.clients}"
                )
            return self.clients, self.clients
        before = int(state.get(_POPULATION, np.int64(clients)))
        return before, max(before, clients)

    def _drop_old_control(self, names: Sequence[str]) -> "ClientPhase":
        import torch  # noqa: PLC0415  see FedAvg

        from wearfleet_cloud.federated.client_program import ClientPhase  # noqa: PLC0415  see FedAvg

        def step(given: "Tensors") -> "Tensors":
            missed = given[_ROUNDS] - given[_SEEN]
            old = (given[_SEEN] > 0.5) & (missed > self.control_rounds)
            return {_OWN + n: torch.where(old, given[_CONTROL + n], given[_OWN + n]) for n in names}

        return ClientPhase("drop_old_control", step, self._once(), ())

    def _update_control(self, names: Sequence[str]) -> "ClientPhase":
        from wearfleet_cloud.federated.client_program import ClientPhase  # noqa: PLC0415  see FedAvg

        def step(given: "Tensors") -> "Tensors":
            results: Tensors = {_SEEN: given[_ROUNDS] + 1.0}
            scale = 1.0 / (given[_STEPS] * given["learning_rate"])
            for name in names:
                moved_by = (given["anchor/" + name] - given[name]) * scale
                change = moved_by - given[_CONTROL + name]
                results |= {_CHANGE + name: change, _OWN + name: given[_OWN + name] + change}
            return results

        rate = ("learning_rate", self.local.learning_rate)
        return ClientPhase("update_control", step, self._once(), (rate,))

    def _once(self) -> Loop:
        return Loop("train", self.local.batch_size, 1, 1, shuffle=False)


def _corrected(grads: "Tensors", params: "Tensors", given: "Tensors") -> "Tensors":  # noqa: ARG001 - of a rule
    """Gradients g - c_i + c."""
    return {name: grad - given[_OWN + name] + given[_CONTROL + name] for name, grad in grads.items()}


def _control_specs(anchors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """For each parameter c, the change of c_i, and c_i; and the numbers of steps and aggregations."""
    steps = TensorSpec(_STEPS, "float32", (), TensorRole.AUX, TensorGroup.OPTIMISER, "zeros")
    rounds = replace(steps, name=_ROUNDS, group=TensorGroup.ANCHOR, origin="global")
    specs: list[TensorSpec] = [steps, rounds, replace(rounds, name=_SEEN, origin="local", copy_of=_STEPS)]
    for anchor in anchors:
        name = anchor.copy_of
        made: Mapping[str, TensorSpec] = {
            "c": replace(anchor, name=_CONTROL + name, role=TensorRole.AUX, origin="global", copy_of=""),
            "change": replace(
                anchor,
                name=_CHANGE + name,
                role=TensorRole.AUX,
                group=TensorGroup.AUX,
                origin="zeros",
                copy_of="",
            ),
            "c_i": replace(
                anchor, name=_OWN + name, role=TensorRole.AUX, origin="local", copy_of=_CHANGE + name
            ),
        }
        specs.extend(made.values())
    return tuple(specs)


def _moved(before: NDArray[Any], kept: float, step: NDArray[Any]) -> NDArray[np.generic]:
    return np.asarray(kept * before.astype(np.float64) + step).astype(before.dtype)
