"""What clients learn from another model, the teacher: how both are judged, and how the embedding is distilled.

Everything that imports torch is imported when it is called: folding updates needs no torch.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.plan import Loop
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.base import LEARNED_ROLES

if TYPE_CHECKING:
    from torch import Tensor
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientPhase
    from wearfleet_cloud.federated.client_steps import Loss, Tensors

__all__ = [
    "GOOD",
    "MEASURED",
    "NORMS",
    "OWN",
    "STAGE",
    "TEACHER",
    "THEIRS",
    "check_listening",
    "distillation",
    "judging",
    "learned_by",
    "scalar",
    "taken_over",
    "teacher_specs",
]

TEACHER: Final = "teacher/"
"""Before the name of a tensor: the teacher's."""
STAGE: Final = "stage"
"""0: no teacher yet, 1: round the ring, 2: personal."""
GOOD: Final = "good_enough"
"""1 once the client's own model was good enough to be kept."""
OWN: Final = "own_correct"
"""Windows that the own model got right, of ``MEASURED``."""
THEIRS: Final = "teacher_correct"
MEASURED: Final = "measured"
NORMS: Final = (TensorRole.NORM_AFFINE, TensorRole.NORM_STAT)


def check_listening(
    name: str, *, threshold: float, personal_threshold: float, strength: float, share_norm: str
) -> None:
    """Refuse hyper-parameters of learning from a teacher that are out of range.

    Raises:
        ConfigError: says which, of the strategy ``name``.
    """
    numbers = {"threshold": threshold, "personal_threshold": personal_threshold, "strength": strength}
    for what, value in numbers.items():
        if not 0.0 <= value < float("inf"):
            raise ConfigError(f"{what} of {name} must be at least 0, got {value}")
    if share_norm not in ("on", "off"):
        raise ConfigError(f"share_norm of {name} must be on or off, got {share_norm!r}")


def learned_by(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Those of a model's tensors that a teacher has: all that training changes but counters."""
    return tuple(
        s
        for s in specs
        if s.group in (TensorGroup.PARAM, TensorGroup.BUFFER)
        and s.role in LEARNED_ROLES
        and s.role != TensorRole.COUNTER
    )


def taken_over(learned: Sequence[TensorSpec], share_norm: str) -> tuple[str, ...]:
    """Names of the tensors that a client takes from its teacher."""
    return tuple(s.name for s in learned if share_norm == "on" or s.role not in NORMS)


def scalar(name: str, group: TensorGroup, origin: str) -> TensorSpec:
    """A () float32 tensor of a strategy's own."""
    fixed = TensorSpec(name, "float32", (), TensorRole.AUX, group, "global")
    return fixed if origin == "global" else replace(fixed, origin="zeros")


def teacher_specs(learned: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The teacher's tensors: sent to all."""
    return tuple(
        replace(s, name=TEACHER + s.name, role=TensorRole.AUX, group=TensorGroup.ANCHOR, origin="global")
        for s in learned
    )


def judging(
    model: "Classifier",
    name: str,
    loop: Loop,
    counts: dict[str, str],
    *,
    teacher: bool = False,
    when: str = "",
) -> "ClientPhase":
    """Count what a model recognises.

    Args:
        model: the client's; its tensors, or with ``teacher`` the teacher's, are judged.
        name: of the phase.
        loop: over the windows.
        counts: name of a tensor to what is added to it, ``correct`` or ``count``.
        teacher: judge the teacher.
        when: as ``ClientPhase.when``.
    """
    from wearfleet_cloud.federated.client_program import ClientPhase  # noqa: PLC0415  see the module
    from wearfleet_cloud.federated.client_steps import evaluation_step  # noqa: PLC0415

    measure, names = evaluation_step(model), tuple(model.state_dict())

    def step(given: "Tensors") -> "Tensors":
        measured = measure({**given, **_teacher_of(given, names)} if teacher else given)
        return {tensor: given[tensor] + measured[what] for tensor, what in counts.items()}

    return ClientPhase(name, step, loop, (), when)


def distillation(model: "Classifier", weight: "Callable[[Tensors], Tensor]") -> "Loss":
    """Cross-entropy + lambda mean squared difference of the embeddings; where lambda is 0 no teacher is heard."""
    import torch  # noqa: PLC0415  see the module

    from wearfleet_cloud.federated.client_steps import (  # noqa: PLC0415
        cross_entropy,
        embedding_of,
        weighted_mean,
    )

    embedding, names = embedding_of(model), tuple(model.state_dict())

    def loss(features: "Tensor", logits: "Tensor", given: "Tensors") -> "Tensor":
        strength = weight(given)
        heard = embedding(_teacher_of(given, names), given["x"])
        theirs = torch.where(strength > 0.0, heard, features.detach())
        apart = ((features - theirs) ** 2).mean(dim=1)
        own = weighted_mean(cross_entropy(logits, given["y"]), given)
        return own + strength * weighted_mean(apart, given)

    return loss


def _teacher_of(given: "Tensors", names: Collection[str]) -> "Tensors":
    """The teacher under the names of a model; standardisation and counters, which it does not have, are the model's."""
    return {name: given.get(TEACHER + name, given[name]) for name in names}
