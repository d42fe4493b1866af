"""What a client does in a round, as pure functions of named tensors.

A strategy describes its client side as a :class:`ClientProgram`. The same program is compiled into a plan
(``plan_builder``) and run directly in torch (``reference_client``); both give the same numbers.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from wearfleet_models.roles import tensor_specs
from wearfleet_protos.plan import Loop
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.plan_compiler import Step
from wearfleet_cloud.federated.training_options import LocalTraining
from wearfleet_cloud.training.optimisers import Optimiser

__all__ = [
    "ANCHOR_PREFIX",
    "ClientPhase",
    "ClientProgram",
    "GradientRule",
    "TrackOrigin",
    "anchor_specs",
    "evaluation_step",
    "local_program",
    "measured",
    "model_specs",
    "on_track",
    "personal_phase",
    "personal_specs",
    "training_phase",
    "training_step",
]

Tensors = dict[str, Tensor]

GradientRule = Callable[[Tensors, Tensors, Tensors], Tensors]
"""From gradients, parameters and everything the step was given to the gradients that the optimiser sees."""

TrackOrigin = Literal["local", "copy"]
"""Where a second track of a model begins: where it ended last round, or at the received model."""

ANCHOR_PREFIX = "anchor/"
PERSONAL_PREFIX = "personal/"
TRAINED_ROLES = (TensorRole.SHARED, TensorRole.NORM_AFFINE, TensorRole.HEAD)
_PACKED = "packed"
_LARGE_PARAMETER = 16_384
"""Elements from which a parameter is updated on its own; smaller ones are updated as one vector, because the fixed
cost of a graph node outweighs their arithmetic, and copying a large one outweighs the node."""


@dataclass(frozen=True, slots=True)
class ClientPhase:
    """One pure step in a loop; results named like a tensor are its new value, the others are metrics to be summed."""

    name: str
    step: Step
    loop: Loop
    scalars: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class ClientProgram:
    """All state tensors of a client and the phases that change them, in order."""

    tensors: tuple[TensorSpec, ...]
    phases: tuple[ClientPhase, ...]


def local_program(
    model: nn.Module,
    local: LocalTraining,
    *,
    keep_local: Sequence[TensorRole] = (),
    extra: Sequence[TensorSpec] = (),
    rule: GradientRule | None = None,
    scalars: tuple[tuple[str, float], ...] = (),
) -> ClientProgram:
    """Evaluate on the held-out part, train, evaluate again.

    Args:
        model: the classifier; it is copied.
        local: optimiser and loop.
        keep_local: roles whose tensors the client keeps from round to round.
        extra: further state tensors, for example anchors.
        rule: changes the gradients before the optimiser; None leaves them.
        scalars: numbers for the rule.

    Returns:
        Phases ``evaluate_before``, ``train``, ``evaluate_after``.
    """
    train, slots = training_phase(model, local, rule=rule, scalars=scalars)
    return measured(model, local, (*model_specs(model, keep_local), *slots, *extra), (train,))


def model_specs(model: nn.Module, keep_local: Collection[TensorRole] = ()) -> tuple[TensorSpec, ...]:
    """The tensors of a model; those of the roles ``keep_local`` begin a round with what the device has."""
    return tuple(
        replace(spec, origin="local") if spec.role in keep_local else spec for spec in tensor_specs(model)
    )


def measured(
    model: nn.Module,
    local: LocalTraining,
    tensors: tuple[TensorSpec, ...],
    phases: tuple[ClientPhase, ...],
    *,
    personal: bool = False,
) -> ClientProgram:
    """A program that evaluates on the held-out part before and after ``phases``; if ``personal``, then the own track."""
    before = ClientPhase("evaluate_before", evaluation_step(model), local.holdout_loop(), ())
    after = replace(before, name="evaluate_after")
    if personal:
        after = replace(after, step=on_track(before.step, _tracked(model), PERSONAL_PREFIX))
    return ClientProgram(tensors, (before, *phases, after))


def personal_specs(model: nn.Module, origin: TrackOrigin) -> tuple[TensorSpec, ...]:
    """A second track of the model: the device's own version of every tensor that is not FROZEN."""
    return tuple(
        replace(
            spec,
            name=PERSONAL_PREFIX + spec.name,
            role=TensorRole.AUX,
            group=TensorGroup.AUX,
            origin=origin,
            copy_of=spec.name,
        )
        for spec in tensor_specs(model)
        if spec.role != TensorRole.FROZEN
    )


def personal_phase(
    model: nn.Module,
    local: LocalTraining,
    *,
    name: str,
    rule: GradientRule | None = None,
    scalars: tuple[tuple[str, float], ...] = (),
) -> tuple[ClientPhase, tuple[TensorSpec, ...]]:
    """As :func:`training_phase`, on the personal track."""
    phase, slots = training_phase(model, local, name=name, rule=rule, scalars=scalars)
    return replace(phase, step=on_track(phase.step, _tracked(model), PERSONAL_PREFIX)), slots


def _tracked(model: nn.Module) -> list[str]:
    return [spec.name for spec in tensor_specs(model) if spec.role != TensorRole.FROZEN]


def training_phase(
    model: nn.Module,
    local: LocalTraining,
    *,
    name: str = "train",
    roles: Collection[TensorRole] = TRAINED_ROLES,
    rule: GradientRule | None = None,
    scalars: tuple[tuple[str, float], ...] = (),
) -> tuple[ClientPhase, tuple[TensorSpec, ...]]:
    """Local epochs as one phase.

    Args:
        model: the classifier; it is copied.
        local: optimiser and loop.
        name: of the phase; unless it is ``train``, the optimiser's tensors begin with it, to be the phase's own.
        roles: of the parameters that are trained.
        rule: changes the gradients before the optimiser.
        scalars: numbers for the rule.

    Returns:
        The phase and the optimiser's tensors.
    """
    step, slots = training_step(model, tensor_specs(model), local.build(), rule, roles=roles)
    if name != "train":
        step = on_track(step, [slot.name for slot in slots], f"{name}/")
        slots = tuple(replace(slot, name=f"{name}/{slot.name}") for slot in slots)
    rates = (("learning_rate", local.learning_rate), *scalars)
    return ClientPhase(name, step, local.train_loop(), rates), slots


def on_track(step: Step, names: Collection[str], prefix: str) -> Step:
    """The step on other tensors: where it reads or writes one of ``names``, that with the prefix is meant."""
    own = frozenset(names)

    def tracked(given: Tensors) -> Tensors:
        results = step({**given, **{name: given[prefix + name] for name in own}})
        return {prefix + name if name in own else name: tensor for name, tensor in results.items()}

    return tracked


def anchor_specs(model: nn.Module) -> tuple[TensorSpec, ...]:
    """One tensor for each trained parameter that keeps its value at the start of the round."""
    return tuple(
        replace(
            spec, name=ANCHOR_PREFIX + spec.name, group=TensorGroup.ANCHOR, origin="copy", copy_of=spec.name
        )
        for spec in tensor_specs(model)
        if _is_trained(spec)
    )


def evaluation_step(model: nn.Module) -> Step:
    """Loss and hits of a batch in evaluation mode.

    Returns:
        A step whose results are ``loss_sum`` (nats), ``correct`` and ``count``, each weighted by window.
    """
    evaluated = copy.deepcopy(model).eval()
    names = tuple(evaluated.state_dict())

    def step(given: Tensors) -> Tensors:
        logits = functional_call(evaluated, {name: given[name] for name in names}, (given["x"],))
        return _metrics(logits, _cross_entropy(logits, given["y"]), given)

    return step


def training_step(
    model: nn.Module,
    specs: Sequence[TensorSpec],
    optimiser: Optimiser,
    rule: GradientRule | None = None,
    *,
    roles: Collection[TensorRole] = TRAINED_ROLES,
) -> tuple[Step, tuple[TensorSpec, ...]]:
    """One optimiser step on the weighted mean cross-entropy of a batch.

    Args:
        model: the classifier; it is copied.
        specs: its tensors.
        optimiser: pure update.
        rule: changes the gradients before the optimiser.
        roles: of the parameters that are trained. Without SHARED the network is in evaluation mode: nothing of what is
            frozen changes, statistics of normalisation neither.

    Returns:
        The step, and the specifications of the optimiser's tensors. Results are the new parameters, the buffers that
        changed, the optimiser's tensors, and the metrics of ``evaluation_step`` on the batch before the update.
    """
    trained = copy.deepcopy(model).train(TensorRole.SHARED in roles)
    weights = {spec.name: spec.shape for spec in specs if _is_trained(spec, roles)}
    groups = _update_groups(weights)
    rest = tuple(spec.name for spec in specs if spec.name not in weights)
    slots = _slot_specs(optimiser, weights, groups)

    def step(given: Tensors) -> Tensors:
        fixed = {name: given[name] for name in rest}

        def objective(params: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            tensors = {**params, **fixed}
            logits = functional_call(trained, tensors, (given["x"], given["weight"], given["rng"]))
            losses = _cross_entropy(logits, given["y"])
            mean = (losses * given["weight"]).sum() / torch.clamp(given["weight"].sum(), min=1e-12)
            changed = {name: tensors[name] for name in rest if tensors[name] is not fixed[name]}
            return mean, (changed, _metrics(logits.detach(), losses.detach(), given))

        params = {name: given[name] for name in weights}
        grads, (_, (buffers, metrics)) = grad_and_value(objective, has_aux=True)(params)
        if rule is not None:
            grads = rule(grads, params, given)
        updated = _update(optimiser, groups, params, grads, given)
        return {**updated, **buffers, **metrics}

    return step, slots


def _is_trained(spec: TensorSpec, roles: Collection[TensorRole] = TRAINED_ROLES) -> bool:
    return spec.group == TensorGroup.PARAM and spec.role in roles


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K), (B,) -> (B,) nats; written with a comparison, whose gradient needs no scatter."""
    chosen = (labels[:, None] == torch.arange(logits.shape[1], device=labels.device)).to(logits.dtype)
    return -(torch.log_softmax(logits, dim=1) * chosen).sum(dim=1)


def _metrics(logits: Tensor, losses: Tensor, given: Tensors) -> Tensors:
    weight = given["weight"]
    hits = (logits.argmax(dim=1) == given["y"]).to(weight.dtype)
    return {
        "loss_sum": (losses * weight).sum(),
        "correct": (hits * weight).sum(),
        "count": weight.sum(),
    }


def _update_groups(weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Names of the parameters that are updated together, by the name of the group."""
    large = {
        name: (name,) for name, shape in weights.items() if torch.Size(shape).numel() >= _LARGE_PARAMETER
    }
    small = tuple(name for name in weights if name not in large)
    return {**large, **({_PACKED: small} if small else {})}


def _slot_specs(
    optimiser: Optimiser, weights: Mapping[str, tuple[int, ...]], groups: Mapping[str, tuple[str, ...]]
) -> tuple[TensorSpec, ...]:
    vectors = {
        group: torch.zeros(sum(torch.Size(weights[name]).numel() for name in names))
        for group, names in groups.items()
    }
    return tuple(
        TensorSpec(name, "float32", tuple(slot.shape), TensorRole.AUX, TensorGroup.OPTIMISER, "zeros")
        for name, slot in optimiser.init(vectors).items()
    )


def _update(
    optimiser: Optimiser,
    groups: Mapping[str, tuple[str, ...]],
    params: Tensors,
    grads: Tensors,
    given: Tensors,
) -> Tensors:
    """Every group by the optimiser as one vector; new parameters in their shapes and new slots."""
    parts: list[Tensors] = []
    for group, names in groups.items():
        vectors, slots = optimiser.update(
            {group: torch.cat([params[name].reshape(-1) for name in names])},
            {group: torch.cat([grads[name].reshape(-1) for name in names])},
            given,
            given["learning_rate"],
        )
        pieces = torch.split(vectors[group], [params[name].numel() for name in names])
        parts.append(
            {name: piece.reshape(params[name].shape) for name, piece in zip(names, pieces, strict=True)}
        )
        parts.append(slots)
    updated = dict(chain.from_iterable(part.items() for part in parts))
    return {name: updated[name] for name in (*params, *(n for n in updated if n not in params))}
