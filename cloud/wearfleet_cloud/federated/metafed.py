"""MetaFed: a ring of clients without an average; each learns from the model of the one before it.

Source: Chen et al. 2022, arXiv:2206.08516, algorithm 1 and section 3; specs/federated.md section 6.
Round by round: ``warm_rounds`` in which all train alone; ``laps`` times round the ring, one client a round, which
either takes over its predecessor's model or, once its own was good enough, learns from it as a teacher; then all with
the last model as the teacher, each as strongly as that model is better. A run has warm_rounds + laps x clients rounds;
the local training that ends a run is that last stage.
Differs: the service passes the models on and, unless they are sealed, sees them; knowledge is the embedding before the
head, the paper's middle choice; accuracies are measured on every fifth training window, which is not trained on,
instead of validation data that also choose the model; a client takes over once a turn, not once an epoch (the published
code's fault); who is not there when its turn comes is passed over, and so is one whose round is skipped: the ring goes
on with the last model that was made, and who comes back has its turn at its place.
A client may be a whole federation, as in the paper: a site's service that is enrolled in the ring's (``ring``), trains
among its own devices (``metafed_site``), and hands in one model.
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

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Contribution, Mean, one_each, uploaded
from wearfleet_cloud.federated.base import LEARNED_ROLES, AveragingStrategy, StrategyInfo
from wearfleet_cloud.federated.sealed_ring import collected, sealed_specs
from wearfleet_cloud.federated.teachers import (
    GOOD,
    MEASURED,
    OWN,
    STAGE,
    TEACHER,
    THEIRS,
    check_listening,
    distillation,
    judging,
    learned_by,
    scalar,
    taken_over,
    teacher_specs,
)

if TYPE_CHECKING:
    from torch import Tensor
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientPhase, ClientProgram
    from wearfleet_cloud.federated.client_steps import Tensors

__all__ = ["SENT", "MetaFed"]

SENT: Final = "sent/"
"""Before the name of a tensor: the client's after its turn, uploaded as it is."""
_AFTER: Final = "correct_after"
_COUNT_AFTER: Final = "measured_after"
_RING: Final = "ring"
_TURNS: Final = "turns"
_PLACE: Final = "place"
"""Where the last turn was, counted on from lap to lap; -1 before the first."""
_WARM: Final = "warm"


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
        sealed: "on": the service passes on models that only the sites of a ring can read; devices cannot take part.
        seats: most sites of a sealed ring.

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
            "judge_teacher",
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
            "sealed": "on or off: only the sites of a ring of federations can read the models (no single devices)",
            "seats": "most sites of a sealed ring, 1 to 64",
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
    sealed: str = "off"
    seats: int = 16

    def __post_init__(self) -> None:
        check_listening(
            "MetaFed",
            threshold=self.threshold,
            personal_threshold=self.personal_threshold,
            strength=self.strength,
            share_norm=self.share_norm,
        )
        if self.warm_rounds < 1 or self.laps < 1:
            raise ConfigError(
                f"warm_rounds and laps of MetaFed must be at least 1, got {self.warm_rounds}, {self.laps}"
            )
        if self.sealed not in ("on", "off") or not 1 <= self.seats <= 64:
            raise ConfigError(
                f"sealed must be on or off and seats 1 to 64, got {self.sealed!r} and {self.seats}"
            )

    def cohort(self, eligible: Sequence[str], round_number: int, state: Arrays) -> tuple[str, ...] | None:
        """All while they warm up and in the last stage; one in its turn, or the next one who is there.

        A turn is of who follows the last one, and no earlier than the round's number says: a round that was skipped
        is not repeated with the same client.
        """
        ring = _ring_of(state)
        turns = int(state.get(_TURNS, np.int64(0)))
        if int(state.get(_WARM, np.int64(0))) < self.warm_rounds or turns >= self.laps * len(ring):
            return None
        place = max(int(state.get(_PLACE, np.int64(-1))) + 1, round_number - 1 - self.warm_rounds) % len(ring)
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
        learned = learned_by(specs)
        train, slots = training_phase(
            model, self.local, loss=distillation(model, self._weight), scalars=(("strength", self.strength),)
        )
        fit = replace(train, loop=replace(train.loop, split="fit"))
        select = replace(self.local.holdout_loop(), split="select")
        phases = (
            judging(model, "judge", select, {OWN: "correct", MEASURED: "count"}, when=STAGE),
            judging(model, "judge_teacher", select, {THEIRS: "correct"}, teacher=True, when=STAGE),
            self._take_over(learned),
            fit,
            judging(model, "judge_after", select, {_AFTER: "correct", _COUNT_AFTER: "count"}),
            self._conclude(learned),
        )
        own = self._own_specs(learned)
        return measured(model, self.local, (*specs, *slots, *own), phases)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """Pass the model of the one client on; count rounds and turns.

        The state holds the ring (names, as JSON in bytes), the rounds of warming up, the turns so far, and the place
        of the last one.

        Raises:
            AggregationError: several clients in a turn, or as ``Averaging.combine``.
        """
        warm, turns, place = (
            int(state.get(name, np.int64(first))) for name, first in ((_WARM, 0), (_TURNS, 0), (_PLACE, -1))
        )
        ring = _ring_of(state)
        changed, mean = self._received(specs, current, contributions, warm=warm < self.warm_rounds)
        if warm < self.warm_rounds:
            warm, ring = warm + 1, tuple(sorted({*ring, *mean.clients}))
        elif turns < self.laps * len(ring):
            if len(mean.clients) != 1:
                raise AggregationError(
                    f"in a turn of the ring one client takes part, got {len(mean.clients)}"
                )
            turns += 1
            place += 1 + (ring.index(mean.clients[0]) - place - 1) % len(ring)
            changed[STAGE] = np.asarray(2.0 if turns == self.laps * len(ring) else 1.0, np.float32)
        else:
            changed = {}
        names = np.frombuffer(json.dumps(ring).encode(), np.uint8)
        counts = {_WARM: warm, _TURNS: turns, _PLACE: place}
        kept: dict[str, NDArray[np.generic]] = {_RING: names}
        kept |= {name: np.asarray(n, np.int64) for name, n in counts.items()}
        return Averaged({**current, **changed}, mean, kept)

    def _received(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        contributions: Iterable[Contribution],
        *,
        warm: bool,
    ) -> tuple[dict[str, NDArray[np.generic]], Mean]:
        """The global tensors that a round changes, and who took part in it."""
        if self.sealed == "on":
            return collected(uploaded(specs, self.info.upload()), current, one_each(contributions), warm=warm)
        mean = self.averaging.combine(specs, self.info.upload(), current, contributions)
        changed: dict[str, NDArray[np.generic]] = {}
        for name in () if warm else (n.removeprefix(SENT) for n in mean.values):
            made = mean.values[SENT + name].astype(current[name].dtype)
            changed |= {name: made, TEACHER + name: made}
        return changed, mean

    def _weight(self, given: "Tensors") -> "Tensor":
        """Lambda: lambda_0 round the ring; lambda_0 10^min(1, 5 (a_T - a_s)) / 10 in the last stage, or 0."""
        import torch  # noqa: PLC0415  see AveragingStrategy

        count = torch.clamp(given[MEASURED], min=1.0)
        mine, theirs = given[OWN] / count, given[THEIRS] / count
        personal = torch.exp(math.log(10.0) * (torch.clamp(5.0 * (theirs - mine), max=1.0) - 1.0))
        deaf = (theirs <= mine) & (theirs < self.personal_threshold)
        personal = torch.where(deaf, torch.zeros_like(personal), personal)
        rate = torch.where(given[STAGE] > 1.5, personal, (given[STAGE] > 0.5).to(personal.dtype))
        return given[GOOD] * given["strength"] * rate

    def _take_over(self, learned: Sequence[TensorSpec]) -> "ClientPhase":
        """The teacher's tensors in place of one's own, unless one's own are good enough; where there is a teacher."""
        import torch  # noqa: PLC0415  see AveragingStrategy

        from wearfleet_cloud.federated.client_program import ClientPhase  # noqa: PLC0415

        taken = taken_over(learned, self.share_norm)

        def step(given: "Tensors") -> "Tensors":
            takes = given[GOOD] < 0.5
            return {name: torch.where(takes, given[TEACHER + name], given[name]) for name in taken}

        return ClientPhase("take_over", step, self._once(), (), STAGE)

    def _conclude(self, learned: Sequence[TensorSpec]) -> "ClientPhase":
        import torch  # noqa: PLC0415  see AveragingStrategy

        from wearfleet_cloud.federated.client_program import ClientPhase  # noqa: PLC0415

        def step(given: "Tensors") -> "Tensors":
            reached = given[_AFTER] > self.threshold * torch.clamp(given[_COUNT_AFTER], min=1.0)
            good = torch.maximum(given[GOOD], reached.to(given[GOOD].dtype))
            return {GOOD: good, **{SENT + s.name: given[s.name] + 0.0 for s in learned}}

        return ClientPhase("conclude", step, self._once(), ())

    def _once(self) -> Loop:
        return Loop("train", self.local.batch_size, 1, 1, shuffle=False)

    def _own_specs(self, learned: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The teacher, what is sent, the counts, and whether the model was good enough.

        In a sealed ring neither the teacher nor what is sent travels as it is.
        """
        counts = tuple(
            scalar(name, TensorGroup.OPTIMISER, "zeros")
            for name in (OWN, THEIRS, MEASURED, _AFTER, _COUNT_AFTER)
        )
        good = replace(counts[0], name=GOOD, origin="local", copy_of=OWN)
        stage, teacher = scalar(STAGE, TensorGroup.ANCHOR, "global"), teacher_specs(learned)
        sent = tuple(
            replace(s, name=SENT + s.name, role=TensorRole.AUX, group=TensorGroup.AUX, origin="zeros")
            for s in learned
        )
        if self.sealed == "off":
            return (stage, *counts, good, *teacher, *sent)
        hidden = (replace(s, group=TensorGroup.OPTIMISER, origin="zeros") for s in (*teacher, *sent))
        return (stage, *counts, good, *hidden, *sealed_specs(learned, self.seats))


def _ring_of(state: Arrays) -> tuple[str, ...]:
    stored: NDArray[np.generic] | None = state.get(_RING)
    return () if stored is None else tuple(json.loads(stored.tobytes()))
