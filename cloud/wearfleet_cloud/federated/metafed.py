"""MetaFed: a ring of clients without an average; each learns from the model of the one before it.

Source: Chen et al. 2022, arXiv:2206.08516, algorithm 1 and section 3; specs/federated.md section 6.
Round by round: ``warm_rounds`` in which all train alone; ``laps`` times round the ring, one client a round, which
either takes over its predecessor's model or, once its own was good enough, learns from it as a teacher; then all with
the last model as the teacher, each as strongly as that model is better. A run has warm_rounds + laps x clients rounds;
the local training that ends a run is that last stage.
Differs: the service passes the models on and sees them (a federation is here one device or gateway); knowledge is the
embedding before the head, the paper's middle choice; accuracies are measured on every fifth training window, which is
not trained on, instead of validation data that also choose the model; a client takes over once a turn, not once an
epoch (the published code's fault); who is not there when its turn comes is passed over, and so is one whose round is
skipped.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.plan import Loop
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Contribution
from wearfleet_cloud.federated.base import LEARNED_ROLES, AveragingStrategy, StrategyInfo

if TYPE_CHECKING:
    from torch import Tensor
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientPhase, ClientProgram
    from wearfleet_cloud.federated.client_steps import Loss, Tensors

__all__ = ["MetaFed"]

_TEACHER: Final = "teacher/"
"""The model of the client before, or in the last stage that of the last client: sent to all."""
_SENT: Final = "sent/"
"""The client's model after its turn: uploaded as it is."""
_STAGE: Final = "stage"
"""0: no teacher yet, 1: round the ring, 2: personal."""
_GOOD: Final = "good_enough"
"""1 once the client's own model was; stays on the device."""
_OWN: Final = "own_correct"
_THEIRS: Final = "teacher_correct"
_AFTER: Final = "correct_after"
_COUNT: Final = "measured"
_RING: Final = "ring"
_TURNS: Final = "turns"
_WARM: Final = "warm"
_NORMS: Final = (TensorRole.NORM_AFFINE, TensorRole.NORM_STAT)


@dataclass(frozen=True, slots=True)
class MetaFed(AveragingStrategy):
    """Cyclic knowledge distillation.

    Args:
        threshold: accuracy from which a client's own model is good enough to learn from a teacher instead of taking the
            teacher's model over; above 1 it never is (that is what the published command does).
        personal_threshold: a teacher that is no better than the client's model and below this is not listened to.
        strength: weight of the teacher's embedding in the loss, >= 0.
        share_norm: "on" or "off"; off, a client that takes over a model keeps its own normalisation.
        warm_rounds: rounds in which all train alone first, >= 1.
        laps: times round the ring, >= 1.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="metafed",
        paper="Chen et al. 2022, arXiv:2206.08516",
        uploaded=(TensorRole.AUX,),
        kept_local=LEARNED_ROLES,
        phases=(
            "evaluate_before",
            "judge",
            "take_over",
            "train",
            "judge_after",
            "conclude",
            "evaluate_after",
        ),
        composes_with=("partial_participation",),
        hyper_parameters={
            "threshold": "accuracy from which a client keeps its model and learns from the teacher's; > 1: never",
            "personal_threshold": "a teacher below this that is no better is not listened to in the last stage",
            "strength": "weight of the teacher's embedding in the loss, >= 0",
            "share_norm": "on or off: take over the teacher's normalisation too",
            "warm_rounds": "rounds in which all train alone first, >= 1",
            "laps": "times round the ring, >= 1; a run has warm_rounds + laps x clients rounds",
        },
        kept_beside=("whether its model was good enough",),
        uploaded_groups=(TensorGroup.AUX,),
        names_cohort=True,
    )
    threshold: float = 0.6
    personal_threshold: float = 0.5
    strength: float = 1.0
    share_norm: str = "off"
    warm_rounds: int = 3
    laps: int = 3

    def __post_init__(self) -> None:
        for name in ("threshold", "personal_threshold", "strength"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} of MetaFed must be at least 0, got {getattr(self, name)}")
        if self.share_norm not in ("on", "off"):
            raise ConfigError(f"share_norm of MetaFed must be on or off, got {self.share_norm!r}")
        if self.warm_rounds < 1 or self.laps < 1:
            raise ConfigError(
                f"warm_rounds and laps of MetaFed must be at least 1, got {self.warm_rounds}, {self.laps}"
            )

    def cohort(self, eligible: Sequence[str], round_number: int, state: Arrays) -> tuple[str, ...] | None:
        """All while they warm up and in the last stage; one in its turn, or the next one who is there."""
        ring = _ring_of(state)
        turns = int(state.get(_TURNS, np.int64(0)))
        if int(state.get(_WARM, np.int64(0))) < self.warm_rounds or turns >= self.laps * len(ring):
            return None
        place = (round_number - 1 - self.warm_rounds) % len(ring)
        there = set(eligible)
        return next(((name,) for name in (*ring[place:], *ring[:place]) if name in there), ())

    def client(self, model: "Classifier") -> "ClientProgram":
        """Judge both models, take the teacher's over or not, train, judge again, and say whether it is good enough."""
        from wearfleet_cloud.federated.client_program import (  # noqa: PLC0415  see AveragingStrategy
            measured,
            model_specs,
            training_phase,
        )

        specs = model_specs(model, self.info.kept_local)
        learned = tuple(s for s in specs if s.role in LEARNED_ROLES and s.role != TensorRole.COUNTER)
        own = _own_specs(learned)
        train, slots = training_phase(
            model, self.local, loss=self._loss(model), scalars=(("strength", self.strength),)
        )
        fit = replace(train, loop=replace(train.loop, split="fit"))
        select = replace(self.local.holdout_loop(), split="select")
        phases = (
            _judge(model, select),
            self._take_over(learned),
            fit,
            _judge_after(model, select),
            self._conclude(learned),
        )
        return measured(model, self.local, (*specs, *slots, *own), phases)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """Pass the model of the one client on; count rounds and turns.

        The state holds the ring (names, as JSON in bytes), the rounds of warming up and the turns so far.

        Raises:
            AggregationError: several clients in a turn, or as ``Averaging.combine``.
        """
        mean = self.averaging.combine(specs, self.info.upload(), current, contributions)
        warm, turns = int(state.get(_WARM, np.int64(0))), int(state.get(_TURNS, np.int64(0)))
        ring = _ring_of(state)
        tensors = dict(current)
        if warm < self.warm_rounds:
            warm, ring = warm + 1, tuple(sorted({*ring, *mean.clients}))
        elif turns < self.laps * len(ring):
            if len(mean.clients) != 1:
                raise AggregationError(
                    f"in a turn of the ring one client takes part, got {len(mean.clients)}"
                )
            turns += 1
            for name in (n.removeprefix(_SENT) for n in mean.values):
                made = mean.values[_SENT + name].astype(current[name].dtype)
                tensors |= {name: made, _TEACHER + name: made}
            tensors[_STAGE] = np.asarray(2.0 if turns == self.laps * len(ring) else 1.0, np.float32)
        names = np.frombuffer(json.dumps(ring).encode(), np.uint8)
        return Averaged(
            tensors, mean, {_RING: names, _WARM: np.asarray(warm), _TURNS: np.asarray(turns, np.int64)}
        )

    def _loss(self, model: "Classifier") -> "Loss":
        """Cross-entropy + lambda mean squared difference of the embeddings; lambda 0 for a model taken over."""
        import torch  # noqa: PLC0415  see AveragingStrategy

        from wearfleet_cloud.federated.client_steps import (  # noqa: PLC0415
            cross_entropy,
            embedding_of,
            weighted_mean,
        )

        embedding, names = embedding_of(model), tuple(model.state_dict())

        def loss(features: "Tensor", logits: "Tensor", given: "Tensors") -> "Tensor":
            heard = embedding(_teacher_of(given, names), given["x"])
            theirs = torch.where(given[_STAGE] > 0.5, heard, features.detach())
            apart = ((features - theirs) ** 2).mean(dim=1)
            own = weighted_mean(cross_entropy(logits, given["y"]), given)
            return own + self._weight(given) * weighted_mean(apart, given)

        return loss

    def _weight(self, given: "Tensors") -> "Tensor":
        """Lambda: lambda_0 round the ring; lambda_0 10^min(1, 5 (a_T - a_s)) / 10 in the last stage, or 0."""
        import torch  # noqa: PLC0415  see AveragingStrategy

        count = torch.clamp(given[_COUNT], min=1.0)
        mine, theirs = given[_OWN] / count, given[_THEIRS] / count
        personal = torch.exp(math.log(10.0) * (torch.clamp(5.0 * (theirs - mine), max=1.0) - 1.0))
        deaf = (theirs <= mine) & (theirs < self.personal_threshold)
        personal = torch.where(deaf, torch.zeros_like(personal), personal)
        rate = torch.where(given[_STAGE] > 1.5, personal, (given[_STAGE] > 0.5).to(personal.dtype))
        return given[_GOOD] * given["strength"] * rate

    def _take_over(self, learned: Sequence[TensorSpec]) -> "ClientPhase":
        """The teacher's tensors in place of one's own, unless there is no teacher or one's own are good enough."""
        import torch  # noqa: PLC0415  see AveragingStrategy

        from wearfleet_cloud.federated.client_program import ClientPhase  # noqa: PLC0415

        taken = [s.name for s in learned if self.share_norm == "on" or s.role not in _NORMS]

        def step(given: "Tensors") -> "Tensors":
            takes = (given[_STAGE] > 0.5) & (given[_GOOD] < 0.5)
            return {name: torch.where(takes, given[_TEACHER + name], given[name]) for name in taken}

        return ClientPhase("take_over", step, self._once(), ())

    def _conclude(self, learned: Sequence[TensorSpec]) -> "ClientPhase":
        import torch  # noqa: PLC0415  see AveragingStrategy

        from wearfleet_cloud.federated.client_program import ClientPhase  # noqa: PLC0415

        def step(given: "Tensors") -> "Tensors":
            reached = given[_AFTER] > self.threshold * torch.clamp(given[_COUNT], min=1.0)
            good = torch.maximum(given[_GOOD], reached.to(given[_GOOD].dtype))
            return {_GOOD: good, **{_SENT + s.name: given[s.name] + 0.0 for s in learned}}

        return ClientPhase("conclude", step, self._once(), ())

    def _once(self) -> Loop:
        return Loop("train", self.local.batch_size, 1, 1, shuffle=False)


def _judge(model: "Classifier", loop: Loop) -> "ClientPhase":
    """Count the windows and the hits of both models."""
    from wearfleet_cloud.federated.client_program import ClientPhase  # noqa: PLC0415  see AveragingStrategy
    from wearfleet_cloud.federated.client_steps import evaluation_step  # noqa: PLC0415

    measure, names = evaluation_step(model), tuple(model.state_dict())

    def step(given: "Tensors") -> "Tensors":
        mine, theirs = measure(given), measure({**given, **_teacher_of(given, names)})
        return {
            _OWN: given[_OWN] + mine["correct"],
            _THEIRS: given[_THEIRS] + theirs["correct"],
            _COUNT: given[_COUNT] + mine["count"],
        }

    return ClientPhase("judge", step, loop, ())


def _judge_after(model: "Classifier", loop: Loop) -> "ClientPhase":
    from wearfleet_cloud.federated.client_program import ClientPhase  # noqa: PLC0415  see AveragingStrategy
    from wearfleet_cloud.federated.client_steps import evaluation_step  # noqa: PLC0415

    measure = evaluation_step(model)
    return ClientPhase(
        "judge_after", lambda given: {_AFTER: given[_AFTER] + measure(given)["correct"]}, loop, ()
    )


def _teacher_of(given: "Tensors", names: Sequence[str]) -> "Tensors":
    """The teacher under the names of a model; standardisation and counters, which it does not have, are the model's."""
    return {name: given.get(_TEACHER + name, given[name]) for name in names}


def _own_specs(learned: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The teacher, what is sent, the counts, and whether the model was good enough."""
    common = TensorSpec(_STAGE, "float32", (), TensorRole.AUX, TensorGroup.ANCHOR, "global")
    counts = tuple(
        replace(common, name=name, group=TensorGroup.OPTIMISER, origin="zeros")
        for name in (_OWN, _THEIRS, _AFTER, _COUNT)
    )
    good = replace(common, name=_GOOD, origin="local", copy_of=_OWN)
    teacher = tuple(
        replace(s, name=_TEACHER + s.name, role=TensorRole.AUX, group=TensorGroup.ANCHOR, origin="global")
        for s in learned
    )
    sent = tuple(
        replace(s, name=_SENT + s.name, role=TensorRole.AUX, group=TensorGroup.AUX, origin="zeros")
        for s in learned
    )
    return (common, *counts, good, *teacher, *sent)


def _ring_of(state: Arrays) -> tuple[str, ...]:
    stored: NDArray[np.generic] | None = state.get(_RING)
    return () if stored is None else tuple(json.loads(stored.tobytes()))
