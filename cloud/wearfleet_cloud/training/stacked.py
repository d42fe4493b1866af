"""Many runs at once: runs that share shapes advance together under ``torch.func.vmap``.

Seeds, learning rates, hyper-parameters and targets may differ from run to run. The windows lie on the device once;
every run has a table of which are its own. Batches and random numbers are those of the single run, so the results are
those of single runs up to the order of sums.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from wearfleet_models import randomness
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.algorithms import Algorithm, algorithm_info, algorithm_kind
from wearfleet_cloud.algorithms.base import Batch, State, Step, Tensors
from wearfleet_cloud.data.dataset import Progress, silent
from wearfleet_cloud.training.examination import on_device
from wearfleet_cloud.training.graphed import GraphedStep, Recorder, StepFunction, cuda_recorder, own_state
from wearfleet_cloud.training.loop import REFRESHES, STEPS
from wearfleet_cloud.training.pool import Pool, Tables, pool_of, tables_of
from wearfleet_cloud.training.run import Run
from wearfleet_cloud.training.sampling import BLOCK
from wearfleet_cloud.training.selection import Scores
from wearfleet_cloud.training.session import Session
from wearfleet_cloud.training.stacked_draws import StackedDraws
from wearfleet_cloud.training.stacked_examination import StackedExamination, stacked_examination
from wearfleet_cloud.training.trainer import TrainResult, conclude

__all__ = ["StackedRuns", "stack_key", "stacked_runs", "train_stacked"]


@dataclass(frozen=True, slots=True)
class StackedRuns:
    """Implements :class:`wearfleet_cloud.training.session.Runner` for R runs of one :func:`stack_key`.

    Args:
        algorithms: of each run, bound to networks of one architecture; the first one's step serves all.
        runs: R.
        pool: windows of the data set.
        tables: which of them each run trains on.
        examination: which of them each run is scored on.
        hyper: (R,) each, of every run.
        keys: (R,) int64 key of every run.
        recorder: of steps, None to run them as they are.
        recorded: steps that were recorded, by kind.
    """

    algorithms: Sequence[Algorithm]
    runs: Sequence[Run]
    pool: Pool
    tables: Tables
    examination: StackedExamination
    hyper: Tensors
    keys: Tensor
    recorder: Recorder | None
    recorded: dict[object, GraphedStep] = field(default_factory=dict)

    def init(self) -> State:
        """As ``Runner.init``."""
        return _stacked([a.init(run.config.seed) for a, run in zip(self.algorithms, self.runs, strict=True)])

    def advance(
        self, state: State, steps: range, on_step: Callable[[int], None]
    ) -> tuple[State, list[dict[str, float]]]:
        """As ``Runner.advance``."""
        state, means = self.make_steps(state, steps, on_step)
        read = {name: value.tolist() for name, value in means.items()}  # waits for the device
        return state, [{name: values[run] for name, values in read.items()} for run in range(len(self.runs))]

    def make_steps(self, state: State, steps: range, on_step: Callable[[int], None]) -> tuple[State, Tensors]:
        """As ``advance``, with the means (R,) still on the device: nothing is read back from it."""
        draws = StackedDraws(self._algorithm, self.tables, self.runs[0].config.batch, self.keys)
        step_keys = vmap(lambda key: randomness.derive(key, STEPS))(self.keys)
        sums: Tensors = {}
        times: Counter[str] = Counter()
        for step in steps:
            if self._algorithm.refresh_at(step, draws.in_a_pass):
                state = self._refreshed(state, step)
            if step == steps.start or step % BLOCK == 0:
                block = _keys_of_block(step_keys, step // BLOCK)
            make = self._step_of(self._algorithm.step_at(step, draws.in_a_pass))
            state, metrics = make(state, draws.at(step), block[:, step % BLOCK])
            sums = {**sums, **{name: sums.get(name, 0.0) + value for name, value in metrics.items()}}
            times.update(metrics.keys())
            on_step(step + 1)
        state = own_state(state) if self.recorder else state
        return state, {name: value / times[name] for name, value in sums.items()}

    def examine(self, state: State) -> list[Scores]:
        """As ``Runner.examine``."""
        model = self._algorithm.model
        tensors = vmap(self._algorithm.inference)(state)
        return self.examination.scores(model, tensors, self.pool, model.spec.classes)

    def keep(self, state: State, before: Tensors | None, better: Sequence[bool]) -> Tensors:
        """As ``Runner.keep``."""
        now: Tensors = vmap(self._algorithm.inference)(state)
        if before is None:
            return now
        new = torch.tensor(better, device=self.pool.x.device)
        return {
            name: torch.where(new.reshape(-1, *[1] * (tensor.dim() - 1)), tensor, before[name])
            for name, tensor in now.items()
        }

    @property
    def _algorithm(self) -> Algorithm:
        return self.algorithms[0]

    def _step_of(self, make: Step) -> StepFunction:
        """A step of the algorithm for all runs, recorded where that is possible."""

        def step_all(state: State, number: Tensor, keys: Tensor) -> tuple[State, Tensors]:
            return _step_all(make, state, self.tables.batch(self.pool, number), self.hyper, keys)

        kind = getattr(
            make, "__func__", None
        )  # the same for every step of a kind, where the bound method is new
        if self.recorder is None or kind is None:
            return step_all
        if kind not in self.recorded:
            self.recorded[kind] = GraphedStep(step_all, self.recorder)
        return self.recorded[kind]

    def _refreshed(self, state: State, step: int) -> State:
        """``refresh`` run by run: each looks at windows of its own, and how many those are may differ."""
        after = []
        for run, algorithm in enumerate(self.algorithms):
            own_hyper = {name: value[run] for name, value in self.hyper.items()}
            rng = randomness.derive(randomness.derive(self.keys[run], REFRESHES), step)
            after.append(algorithm.refresh(_of(state, run), self.tables.of(self.pool, run), own_hyper, rng))
        return _stacked(after)


def stacked_runs(runs: Sequence[Run], recorder: Recorder | None = None) -> StackedRuns:
    """Build networks and algorithms of runs of one :func:`stack_key`, and copy the windows to their device.

    Args:
        runs: at least one.
        recorder: of steps; None for the one that suits the device (CUDA graphs on a GPU).
    """
    device = torch.device(runs[0].config.device)
    values = [run.hyper() for run in runs]
    seeds = torch.tensor([run.config.seed for run in runs], device=device)
    return StackedRuns(
        [run.build() for run in runs],
        runs,
        pool_of(runs[0].scenario.prepared.windows, device),
        tables_of(runs, device),
        stacked_examination(runs, device),
        hyper={name: torch.tensor([float(v[name]) for v in values], device=device) for name in values[0]},
        keys=vmap(lambda seed: randomness.derive(seed, 0))(seeds),
        recorder=recorder or (cuda_recorder if device.type == "cuda" else None),
    )


def stack_key(run: Run) -> str:
    """Runs of one key can advance together; empty when the run must be made alone.

    Equal are: data set, algorithm with its options, network, number of source domains, and all settings but seed,
    learning rate, hyper-parameters and selection rule. Where an algorithm counts passes through the windows, or looks
    at all of them at once, the numbers of training windows are equal too.
    """
    kind = algorithm_kind(run.algorithm)
    if kind.info.alone:
        return ""
    settings = asdict(run.config)
    for free in ("seed", "lr", "hyper", "selection"):
        del settings[free]
    sizes = [len(domain) for domain in run.split.train]
    counts_passes = kind.info.sampling == "pooled" or any(
        getattr(kind, name) is not getattr(Algorithm, name) for name in ("step_at", "refresh_at", "refresh")
    )
    dataset = run.scenario.prepared.dataset
    return json.dumps(
        [
            dataset.name,
            run.scenario.name if run.scenario.name in dataset.views else "",
            run.algorithm,
            asdict(run.spec),
            settings,
            len(sizes),
            [sum(sizes), min(sizes)] if counts_passes else [],
        ],
        sort_keys=True,
    )


def train_stacked(runs: Sequence[Run], folder: Path, progress: Progress = silent) -> list[TrainResult]:
    """Train runs together and write each into its folder; a stack that was interrupted there goes on.

    Args:
        runs: at least one, all of one :func:`stack_key`, which is not empty.
        folder: of the checkpoint; made when missing.
        progress: called with ("training", steps made, steps in all).

    Returns:
        The result of every run, as ``train`` gives it.

    Raises:
        ConfigError: runs that cannot be stacked; or a run diverged (the others are written).
        DataError, ConflictError, IntegrityError: as for ``train``.
    """
    _check_stackable(runs)
    for place in (folder, *(run.folder for run in runs)):
        place.mkdir(parents=True, exist_ok=True)
    device = torch.device(runs[0].config.device)
    runner = stacked_runs(runs)
    last = Session(runner, runs, _fingerprint(runs), folder).finish(progress)
    results, diverged = [], None
    for number, (run, algorithm) in enumerate(zip(runs, runner.algorithms, strict=True)):
        target = on_device(run.scenario.target.x, run.scenario.target.y, device)
        kept = {name: tensor[number] for name, tensor in last.kept.items()}
        best = last.best[number]
        try:
            results.append(
                conclude(
                    run,
                    algorithm.model,
                    target,
                    kept=kept,
                    best=best,
                    seconds=last.seconds,
                    stacked=len(runs),
                )
            )
        except ConfigError as error:
            diverged = error  # the others have their results
    if diverged:
        raise diverged
    return results


def _check_stackable(runs: Sequence[Run]) -> None:
    keys = {stack_key(run) for run in runs}
    if "" in keys:
        info = algorithm_info(runs[0].algorithm)
        raise ConfigError(f"runs of {info.name} cannot be stacked: {info.alone}; train them one by one")
    if len(keys) != 1:
        raise ConfigError(f"only runs of one stack_key can be stacked, got {len(keys)} different ones")


def _fingerprint(runs: Sequence[Run]) -> str:
    """Hash of all that decides the numbers of the runs."""
    digest = hashlib.sha256()
    windows = runs[0].scenario.prepared.windows
    digest.update(np.ascontiguousarray(windows.x).data)
    digest.update(np.ascontiguousarray(windows.activity).data)
    for run in runs:
        settings = [run.algorithm, run.scenario.name, run.scenario.seed, asdict(run.spec), asdict(run.config)]
        digest.update(json.dumps([*settings, run.split_hash()], sort_keys=True).encode())
    return digest.hexdigest()


def _step_all(make: Step, state: State, batch: Batch, hyper: Tensors, keys: Tensor) -> tuple[State, Tensors]:
    """One step of every run; all arguments have the runs first."""
    assert batch.number is not None

    def one(  # noqa: PLR0917 - what vmap maps over stands in its order
        state: State, x: Tensor, y: Tensor, number: Tensor, hyper: Tensors, rng: Tensor
    ) -> tuple[State, Tensors]:
        return make(state, Batch(x, y, None, number), hyper, rng)

    after: tuple[State, Tensors] = vmap(one)(state, batch.x, batch.y, batch.number, hyper, keys)
    return after


def _keys_of_block(step_keys: Tensor, block: int) -> Tensor:
    """(R, 64) int64 keys of the steps of a block."""
    numbers = torch.arange(block * BLOCK, (block + 1) * BLOCK, device=step_keys.device)
    keys: Tensor = vmap(lambda key: randomness.derive(key, numbers))(step_keys)
    return keys


def _stacked(states: Sequence[State]) -> State:
    return State(
        *(
            {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
            for parts in zip(*states, strict=True)
        )
    )


def _of(state: State, run: int) -> State:
    return State(*({name: tensor[run] for name, tensor in part.items()} for part in state))
