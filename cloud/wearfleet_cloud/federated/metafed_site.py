"""MetaFed within one site of a ring of federations: the site's turn, as a run among its own devices.

Source: Chen et al. 2022, arXiv:2206.08516, algorithm 1, where a federation has a server and clients of its own;
specs/federated.md section 6. A turn is ``passes`` + 2 rounds: the devices judge the site's model and the teacher; the
site takes the teacher over or keeps its own; the devices train ``passes`` times, with the teacher if it is listened to,
and are averaged; they judge what came of it. With no teacher it is federated averaging between two judgements.
The teacher, the stage and whether the site was good enough before are tensors of the run (``ring.turns`` sets them).
Differs: accuracies are of all devices together, each window counting once; a teacher that is much worse than the site's
own model can be turned away (``gate``), because poison would travel the ring.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Contribution, moved
from wearfleet_cloud.federated.base import LEARNED_ROLES, AveragingStrategy, StrategyInfo
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
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["TURNS", "MetaFedSite"]

TURNS: Final = "turns"
"""Turns that the run has finished."""
_TRAINS: Final = "trains"
"""1 in the rounds in which the devices train."""
_WEIGHT: Final = "teacher_weight"
"""Lambda, of all devices."""
_PASSES: Final = "passes"


@dataclass(frozen=True, slots=True)
class MetaFedSite(AveragingStrategy):
    """A site's turn.

    Args:
        threshold: as ``MetaFed``; of the accuracy over all of the site's devices.
        personal_threshold: as ``MetaFed``.
        strength: as ``MetaFed``.
        share_norm: as ``MetaFed``; off, a site that takes over a model keeps its own normalisation.
        passes: rounds of training a turn, >= 1.
        gate: a teacher whose accuracy is lower than that of the site's own model by more than this is neither taken
            over nor listened to; 1 takes every one.

    Raises:
        ConfigError: a hyper-parameter is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="metafed-site",
        paper="Chen et al. 2022, arXiv:2206.08516",
        uploaded=(*LEARNED_ROLES, TensorRole.AUX),
        phases=("evaluate_before", "judge", "judge_teacher", "train", "evaluate_after"),
        composes_with=("partial_participation",),
        hyper_parameters={
            "threshold": "accuracy from which the site keeps its model and learns from the teacher's; > 1: never",
            "personal_threshold": "a teacher below this that is no better is not listened to in the last stage",
            "strength": "weight of the teacher's embedding in the loss, >= 0",
            "share_norm": "on or off: take over the teacher's normalisation too",
            "passes": "rounds of training a turn, >= 1; a turn is passes + 2 rounds",
            "gate": "a teacher that is less accurate than the site's model by more than this is turned away, 0 to 1",
        },
        uploaded_groups=(TensorGroup.PARAM, TensorGroup.BUFFER, TensorGroup.AUX),
    )
    threshold: float = 0.6
    personal_threshold: float = 0.5
    strength: float = 1.0
    share_norm: str = "off"
    passes: int = 3
    gate: float = 1.0

    def __post_init__(self) -> None:
        check_listening(
            "metafed-site",
            threshold=self.threshold,
            personal_threshold=self.personal_threshold,
            strength=self.strength,
            share_norm=self.share_norm,
        )
        if self.passes < 1 or not 0.0 <= self.gate <= 1.0:
            raise ConfigError(
                f"passes must be at least 1 and gate 0 to 1, got {self.passes} and {self.gate} (metafed-site)"
            )

    @property
    def rounds(self) -> int:
        """Of a turn."""
        return self.passes + 2

    def client(self, model: "Classifier") -> "ClientProgram":
        """Judge the model as received (and the teacher, before the first training); train when it is time to."""
        from wearfleet_cloud.federated.client_program import (  # noqa: PLC0415  see AveragingStrategy
            measured,
            model_specs,
            training_phase,
        )

        specs = model_specs(model)
        train, slots = training_phase(
            model, self.local, loss=distillation(model, lambda given: given[_WEIGHT])
        )
        fit = replace(train, loop=replace(train.loop, split="fit"), when=_TRAINS)
        select = replace(self.local.holdout_loop(), split="select")
        phases = (
            judging(model, "judge", select, {OWN: "correct", MEASURED: "count"}),
            judging(model, "judge_teacher", select, {THEIRS: "correct"}, teacher=True, when=STAGE),
            fit,
        )
        own = (
            *(scalar(name, TensorGroup.ANCHOR, "global") for name in (STAGE, GOOD, _TRAINS, _WEIGHT, TURNS)),
            *(scalar(name, TensorGroup.AUX, "zeros") for name in (OWN, THEIRS, MEASURED)),
        )
        return measured(model, self.local, (*specs, *slots, *own, *teacher_specs(learned_by(specs))), phases)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """Average what was trained, add up what was judged, and decide what comes next.

        The state holds how often the devices have trained in this turn.

        Raises:
            AggregationError: as ``Averaging.combine``.
        """
        counts = _Counts()
        mean = self.averaging.combine(
            specs, self.info.upload(), current, (counts.noting(part) for part in contributions)
        )
        tensors = moved(current, mean, self.info.upload())
        passes = int(state.get(_PASSES, np.int64(0)))
        changed: Mapping[str, float]
        if float(current[_TRAINS]) > 0.5:
            passes += 1
            changed = {_TRAINS: float(passes < self.passes)}
        elif passes == 0:
            changed = self._opened(specs, current, counts, tensors)
        else:
            good = max(float(current[GOOD]), float(counts.accuracy(OWN) > self.threshold))
            passes, changed = 0, {GOOD: good, TURNS: float(current[TURNS]) + 1.0}
        tensors |= {name: np.asarray(value, np.float32) for name, value in changed.items()}
        return Averaged(tensors, mean, {_PASSES: np.asarray(passes, np.int64)})

    def _opened(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        counts: "_Counts",
        tensors: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]],
    ) -> Mapping[str, float]:
        """What training begins with; puts the teacher in place of the site's model if it is taken over."""
        own, theirs, stage = counts.accuracy(OWN), counts.accuracy(THEIRS), float(current[STAGE])
        weight = 0.0
        if stage > 0.5 and theirs >= own - self.gate:
            if float(current[GOOD]) < 0.5:
                taken = taken_over(learned_by(specs), self.share_norm)
                tensors |= {name: current[TEACHER + name] for name in taken}
            else:
                weight = self.strength * (1.0 if stage < 1.5 else self._personal_rate(own, theirs))
        return {_TRAINS: 1.0, _WEIGHT: weight, STAGE: 0.0}

    def _personal_rate(self, own: float, theirs: float) -> float:
        """As in ``MetaFed``: 10^min(1, 5 (a_T - a_s)) / 10, or 0."""
        if theirs <= own and theirs < self.personal_threshold:
            return 0.0
        return float(10.0 ** min(1.0, 5.0 * (theirs - own)) / 10.0)


@dataclass(slots=True)
class _Counts:
    """Sums over devices of what they counted; a device counts while its update is folded."""

    sums: dict[str, float] = field(default_factory=dict)

    def noting(self, part: Contribution) -> Contribution:
        """The same contribution, which adds to the sums when it is loaded."""
        return replace(part, load=partial(self._load, part))

    def _load(self, part: Contribution) -> Arrays:
        update = part.load()
        for name in (OWN, THEIRS, MEASURED):
            if name in update:
                self.sums[name] = self.sums.get(name, 0.0) + float(update[name])
        return update

    def accuracy(self, what: str) -> float:
        """Share of the judged windows; 0 when there were none."""
        return self.sums.get(what, 0.0) / max(self.sums.get(MEASURED, 0.0), 1.0)
