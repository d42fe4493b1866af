"""What a client does in a round, as pure functions of named tensors.

A strategy describes its client side as a :class:`ClientProgram`. The same program is compiled into a plan
(``plan_builder``) and run directly in torch (``reference_client``); both give the same numbers.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from wearfleet_models.classifier import Classifier
from wearfleet_models.roles import tensor_specs
from wearfleet_protos.plan import Loop
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.client_steps import (
    TRAINED_ROLES,
    Direction,
    GradientRule,
    Loss,
    Tensors,
    evaluation_step,
    is_trained,
    optimising_step,
    ruled,
    training_step,
)
from wearfleet_cloud.federated.plan_compiler import Step
from wearfleet_cloud.federated.privacy.options import RECORD_CLIP, RECORD_SIGMA
from wearfleet_cloud.federated.record_gradients import noised_gradient, noised_numbers
from wearfleet_cloud.federated.training_options import LocalTraining

__all__ = [
    "ANCHOR_PREFIX",
    "ClientPhase",
    "ClientProgram",
    "TrackOrigin",
    "anchor_specs",
    "local_program",
    "measured",
    "model_specs",
    "on_track",
    "optimised_phase",
    "personal_phase",
    "personal_specs",
    "training_phase",
]

TrackOrigin = Literal["local", "copy"]
"""Where a second track of a model begins: where it ended last round, or at the received model."""

ANCHOR_PREFIX = "anchor/"
PERSONAL_PREFIX = "personal/"


@dataclass(frozen=True, slots=True)
class ClientPhase:
    """One pure step in a loop; results named like a tensor are its new value, the others are metrics to be summed.

    With ``when``, the name of a () float32 tensor, it is left out where that is not above 1/2. ``noise`` is how many
    secret normal numbers a step takes.
    """

    name: str
    step: Step
    loop: Loop
    scalars: tuple[tuple[str, float], ...]
    when: str = ""
    noise: int = 0


@dataclass(frozen=True, slots=True)
class ClientProgram:
    """All state tensors of a client and the phases that change them, in order."""

    tensors: tuple[TensorSpec, ...]
    phases: tuple[ClientPhase, ...]


def local_program(
    model: Classifier,
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


def model_specs(model: Classifier, keep_local: Collection[TensorRole] = ()) -> tuple[TensorSpec, ...]:
    """The tensors of a model; those of the roles ``keep_local`` begin a round with what the device has."""
    return tuple(
        replace(spec, origin="local") if spec.role in keep_local else spec for spec in tensor_specs(model)
    )


def measured(
    model: Classifier,
    local: LocalTraining,
    tensors: tuple[TensorSpec, ...],
    phases: tuple[ClientPhase, ...],
    *,
    personal: bool = False,
) -> ClientProgram:
    """A program that evaluates on the held-out part before and after ``phases``; if ``personal``, then its track."""
    before = ClientPhase("evaluate_before", evaluation_step(model), local.holdout_loop(), ())
    after = replace(before, name="evaluate_after")
    if personal:
        after = replace(after, step=on_track(before.step, _tracked(model), PERSONAL_PREFIX))
    return ClientProgram(tensors, (before, *phases, after))


def personal_specs(model: Classifier, origin: TrackOrigin) -> tuple[TensorSpec, ...]:
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
    model: Classifier,
    local: LocalTraining,
    *,
    name: str,
    rule: GradientRule | None = None,
    scalars: tuple[tuple[str, float], ...] = (),
) -> tuple[ClientPhase, tuple[TensorSpec, ...]]:
    """As :func:`training_phase`, on the personal track, which stays on the device and needs no noise."""
    phase, slots = training_phase(model, replace(local, record=None), name=name, rule=rule, scalars=scalars)
    return replace(phase, step=on_track(phase.step, _tracked(model), PERSONAL_PREFIX)), slots


def _tracked(model: Classifier) -> list[str]:
    return [spec.name for spec in tensor_specs(model) if spec.role != TensorRole.FROZEN]


def training_phase(
    model: Classifier,
    local: LocalTraining,
    *,
    name: str = "train",
    roles: Collection[TensorRole] = TRAINED_ROLES,
    rule: GradientRule | None = None,
    loss: Loss | None = None,
    scalars: tuple[tuple[str, float], ...] = (),
) -> tuple[ClientPhase, tuple[TensorSpec, ...]]:
    """Local epochs as one phase.

    Args:
        model: the classifier; it is copied.
        local: optimiser and loop.
        name: of the phase; unless it is ``train``, the optimiser's tensors begin with it, to be the phase's own.
        roles: of the parameters that are trained.
        rule: changes the gradients before the optimiser, after the noise of ``local.record``.
        loss: None for the weighted mean cross-entropy.
        scalars: numbers for the rule and the loss.

    Returns:
        The phase and the optimiser's tensors.
    """
    specs = tensor_specs(model)
    if local.record is None:
        step, slots = training_step(model, specs, local.build(), rule, roles=roles, loss=loss)
        return _phase_of(name, step, slots, local, scalars)
    direction = ruled(noised_gradient(model, specs, roles, loss), rule)
    step, slots = optimising_step(specs, local.build(), direction, roles)
    sizes = ((RECORD_CLIP, local.record.clip), (RECORD_SIGMA, local.record.sigma))
    phase, slots = _phase_of(name, step, slots, local, (*sizes, *scalars))
    return replace(phase, noise=noised_numbers(specs, roles)), slots


def optimised_phase(
    model: Classifier,
    local: LocalTraining,
    direction: Direction,
    *,
    name: str,
    roles: Collection[TensorRole],
    scalars: tuple[tuple[str, float], ...] = (),
) -> tuple[ClientPhase, tuple[TensorSpec, ...]]:
    """As :func:`training_phase`, along any direction instead of the gradient of a loss."""
    step, slots = optimising_step(tensor_specs(model), local.build(), direction, roles)
    return _phase_of(name, step, slots, local, scalars)


def _phase_of(
    name: str,
    step: Step,
    slots: tuple[TensorSpec, ...],
    local: LocalTraining,
    scalars: tuple[tuple[str, float], ...],
) -> tuple[ClientPhase, tuple[TensorSpec, ...]]:
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


def anchor_specs(model: Classifier) -> tuple[TensorSpec, ...]:
    """One tensor for each trained parameter that keeps its value at the start of the round."""
    return tuple(
        replace(
            spec, name=ANCHOR_PREFIX + spec.name, group=TensorGroup.ANCHOR, origin="copy", copy_of=spec.name
        )
        for spec in tensor_specs(model)
        if is_trained(spec)
    )
