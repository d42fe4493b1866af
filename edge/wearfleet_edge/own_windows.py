"""This device as a trainer: plans run on its wearer's windows, and personal weights are laid over its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from wearfleet_edge.local_state import encode_personal
from wearfleet_edge.runtime import Personal, Recogniser
from wearfleet_edge.trainer import personal_tensors, run_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from wearfleet_protos.plan import InputContract, Plan
    from wearfleet_protos.tensors import Digest

    from wearfleet_edge.local_state import PersonalOrigin
    from wearfleet_edge.runtime import Evaluation
    from wearfleet_edge.slots import InstalledModel
    from wearfleet_edge.trainer import Limits, PlanResult, Tensors, TrainingData
    from wearfleet_edge.transport.cloud import Task

__all__ = ["OwnWindows"]

_OOD_QUANTILE: Final = 0.95


@dataclass(frozen=True, slots=True)
class OwnWindows:
    """Implements ``federated.Trainer``.

    Args:
        data: labelled windows for a contract.
        released: evaluation of the model as released on the later windows.
    """

    data: Callable[[InputContract], TrainingData]
    released: Callable[[], Evaluation]

    def run(
        self, plan: Plan, graphs: Mapping[Digest, bytes], before: Tensors, *, task: Task, limits: Limits
    ) -> PlanResult:
        """As :func:`wearfleet_edge.trainer.run_plan`."""
        data = self.data(plan.contract)
        return run_plan(plan, graphs, before, data, round_number=task.round_number, limits=limits)

    def base(self) -> Evaluation:
        """The model as released."""
        return self.released()

    def personalise(
        self, plan: Plan, result: PlanResult, installed: InstalledModel, origin: PersonalOrigin
    ) -> tuple[bytes, Evaluation]:
        """Lay the trained tensors over the model, set the wearer's own threshold, and measure."""
        data = self.data(plan.contract)
        tensors = personal_tensors(plan, result.state)
        trial = Recogniser(installed.model, installed.manifest, Personal(tensors, float("inf")))
        scores = trial.ood_scores(data.train.x)
        personal = Personal(tensors, float(np.quantile(scores, _OOD_QUANTILE)))
        return encode_personal(personal, origin), trial.evaluate(data.holdout)
