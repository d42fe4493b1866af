"""One run on its own: its windows on the device, advanced by the plain loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from wearfleet_models import randomness

from wearfleet_cloud.algorithms.base import Algorithm, State, Tensors
from wearfleet_cloud.training.examination import Examination, examine, mixed_windows, on_device
from wearfleet_cloud.training.loop import Resident, advance, resident
from wearfleet_cloud.training.run import Run
from wearfleet_cloud.training.selection import Scores

__all__ = ["SingleRun", "single_run"]


@dataclass(frozen=True, slots=True)
class SingleRun:
    """Implements :class:`wearfleet_cloud.training.session.Runner` for one run."""

    algorithm: Algorithm
    run: Run
    train: Resident
    examination: Examination

    def init(self) -> State:
        """As ``Runner.init``."""
        return self.algorithm.init(self.run.config.seed)

    def advance(
        self, state: State, steps: range, on_step: Callable[[int], None]
    ) -> tuple[State, list[dict[str, float]]]:
        """As ``Runner.advance``."""
        config = self.run.config
        state, means = advance(
            self.algorithm,
            state,
            self.train,
            self._hyper(),
            key=randomness.derive(torch.tensor(config.seed, device=config.device), 0),
            steps=steps,
            batch=config.batch,
            on_step=on_step,
        )
        return state, [{name: float(value) for name, value in means.items()}]  # waits for the device

    def examine(self, state: State) -> list[Scores]:
        """As ``Runner.examine``."""
        model, tensors = self.algorithm.model, self.algorithm.inference(state)
        return [examine(model, tensors, self.examination, model.spec.classes, self.transduce(tensors))]

    def transduce(self, tensors: Tensors) -> Tensor | None:
        """As ``Algorithm.transduce``, of the run's target."""
        target = self.examination.target.x
        return self.algorithm.transduce(tensors, self.train, target, self._hyper())

    def keep(self, state: State, before: Tensors | None, better: Sequence[bool]) -> Tensors:
        """As ``Runner.keep``."""
        return self.algorithm.inference(state) if before is None or better[0] else before

    def _hyper(self) -> dict[str, Tensor]:
        device = self.run.config.device
        return {name: torch.tensor(float(value), device=device) for name, value in self.run.hyper().items()}


def single_run(run: Run) -> SingleRun:
    """Build network and algorithm, and copy the windows to the device.

    Raises:
        DataError: a source domain without windows.
        ShapeError: windows that are not finite.
    """
    device, split = torch.device(run.config.device), run.split
    held_out = [(domain.x, domain.y) for domain in split.validation]
    examination = Examination(
        validation=[on_device(x, y, device) for x, y in held_out],
        mixed=mixed_windows(held_out, run.scenario.seed, device),
        target=on_device(run.scenario.target.x, run.scenario.target.y, device),
    )
    train = resident([(domain.x, domain.y) for domain in split.train], device)
    return SingleRun(run.build(), run, train, examination)
