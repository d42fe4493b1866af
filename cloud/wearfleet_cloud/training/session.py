"""Runs in segments: advance to the next evaluation, score, select, write down, repeat; resumes where it stopped."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from wearfleet_protos.errors import ConflictError

from wearfleet_cloud.algorithms.base import State, Tensors
from wearfleet_cloud.data.dataset import Progress
from wearfleet_cloud.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, write_atomically
from wearfleet_cloud.training.run import Run
from wearfleet_cloud.training.selection import Scores, select_all

__all__ = ["CHECKPOINT_FILE", "Runner", "Session"]

_DIVERGED: Final = Scores(0.0, 0.0, 0.0, 0.0)
"""Of a network whose loss was not finite: never better than one that learned, whatever class its NaN fall on."""
CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"


class Runner(Protocol):
    """What advances one run, or several together."""

    def init(self) -> State:
        """The state before the first step."""

    def advance(
        self, state: State, steps: range, on_step: Callable[[int], None]
    ) -> tuple[State, list[dict[str, float]]]:
        """The state after these steps, and the mean of every metric over them for every run."""

    def examine(self, state: State) -> list[Scores]:
        """The scores of every run."""

    def keep(self, state: State, before: Tensors | None, better: Sequence[bool]) -> Tensors:
        """Tensors of the networks that predict: now where a run got better, those from before where not."""


@dataclass(frozen=True, slots=True)
class Session:
    """Runs that advance together, and where they are kept.

    Args:
        runner: that advances them.
        runs: all of the same number of steps and evaluations.
        fingerprint: of settings and data of all of them.
        folder: of the checkpoint.
    """

    runner: Runner
    runs: Sequence[Run]
    fingerprint: str
    folder: Path

    def finish(self, progress: Progress) -> Checkpoint:
        """Train to the end, from the checkpoint in the folder when there is one.

        Args:
            progress: called with ("training", steps made, steps in all).

        Returns:
            The last checkpoint.

        Raises:
            ConflictError: the folder holds a run of other settings or other data.
            IntegrityError: the checkpoint is damaged.
        """
        checkpoint = self._stored()
        for run in self.runs:
            _rewrite_metrics(run.folder / METRICS_FILE, checkpoint.step if checkpoint else 0)
        while checkpoint is None or checkpoint.step < self.runs[0].config.steps:
            checkpoint, rows = self._segment(checkpoint, progress)
            for run, row in zip(self.runs, rows, strict=True):
                with (run.folder / METRICS_FILE).open("a") as file:
                    file.write(json.dumps(row) + "\n")
            save_checkpoint(self._file, checkpoint)
        return checkpoint

    @property
    def _file(self) -> Path:
        return self.folder / CHECKPOINT_FILE

    def _stored(self) -> Checkpoint | None:
        if not self._file.exists():
            return None
        checkpoint = load_checkpoint(self._file, torch.device(self.runs[0].config.device))
        if checkpoint.fingerprint != self.fingerprint:
            raise ConflictError(
                f"{self.folder} holds a run with other settings or data; choose another folder or delete it"
            )
        return checkpoint

    def _segment(
        self, before: Checkpoint | None, progress: Progress
    ) -> tuple[Checkpoint, list[dict[str, object]]]:
        """Advance to the next evaluation and score."""
        config = self.runs[0].config
        state = before.state if before else self.runner.init()
        first = before.step if before else 0
        last = min((first // config.evaluate_every + 1) * config.evaluate_every, config.steps)
        began = time.perf_counter()
        state, metrics = self.runner.advance(
            state, range(first, last), lambda step: progress("training", step, config.steps)
        )
        seconds = (before.seconds if before else 0.0) + time.perf_counter() - began
        finite = [math.isfinite(means["loss"]) for means in metrics]
        examined = self.runner.examine(state)
        scores = [own if sane else _DIVERGED for own, sane in zip(examined, finite, strict=True)]
        older = before.best if before else (None,) * len(scores)
        best = tuple(select_all(old, last, new) for old, new in zip(older, scores, strict=True))
        better = [b[run.config.selection].step == last for run, b in zip(self.runs, best, strict=True)]
        kept = self.runner.keep(state, dict(before.kept) if before else None, better)
        rows: list[dict[str, object]] = [
            {"step": last, **_json(means), **asdict(score), "seconds": round(seconds, 3)}
            for means, score in zip(metrics, scores, strict=True)
        ]
        return Checkpoint(self.fingerprint, last, state, best, kept, seconds), rows


def _json(means: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no number that is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in means.items()}


def _rewrite_metrics(path: Path, last_step: int) -> None:
    """Drop rows later than the checkpoint: their steps will be made again."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= last_step]
    write_atomically(path, "".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> float:
    """The step of a row; infinity for a row that a crash cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
