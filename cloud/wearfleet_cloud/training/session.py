"""One run in segments: advance to the next evaluation, score, select, write down, repeat; resumes where it stopped."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from wearfleet_models import Classifier, randomness
from wearfleet_protos.errors import ConflictError

from wearfleet_cloud.algorithms import Algorithm, State
from wearfleet_cloud.data.dataset import Progress
from wearfleet_cloud.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, write_atomically
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.loop import Resident, advance
from wearfleet_cloud.training.metrics import accuracy_of, evaluate, macro_f1
from wearfleet_cloud.training.selection import mean_over_domains, select

__all__ = ["Session", "Windows", "on_device"]

CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows to score on, on the device: x (N, C, T) raw, y (N,)."""

    x: Tensor
    y: Tensor


def on_device(x: NDArray[np.float32], y: NDArray[np.int64], device: torch.device) -> Windows:
    """Copy windows to a device."""
    return Windows(torch.tensor(x, device=device), torch.tensor(y, dtype=torch.int64, device=device))


@dataclass(frozen=True, slots=True)
class Session:
    """A run and where it is kept.

    Args:
        algorithm: bound to ``model``.
        model: the network.
        config: settings.
        fingerprint: of settings and data.
        train: windows to train on.
        validation: one set a source domain.
        target: windows of the unseen domain; scored, never used to choose.
        folder: of the checkpoint and the metrics.
    """

    algorithm: Algorithm
    model: Classifier
    config: TrainConfig
    fingerprint: str
    train: Resident
    validation: Sequence[Windows]
    target: Windows
    folder: Path

    def run(self, progress: Progress) -> Checkpoint:
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
        self._rewrite_metrics(checkpoint.step if checkpoint else 0)
        while checkpoint is None or checkpoint.step < self.config.steps:
            checkpoint, row = self._segment(checkpoint, progress)
            with (self.folder / METRICS_FILE).open("a") as file:
                file.write(json.dumps(row) + "\n")
            save_checkpoint(self.folder / CHECKPOINT_FILE, checkpoint)
        return checkpoint

    def _stored(self) -> Checkpoint | None:
        path = self.folder / CHECKPOINT_FILE
        if not path.exists():
            return None
        checkpoint = load_checkpoint(path, torch.device(self.config.device))
        if checkpoint.fingerprint != self.fingerprint:
            raise ConflictError(
                f"{self.folder} holds a run with other settings or data; choose another folder or delete it"
            )
        return checkpoint

    def _rewrite_metrics(self, last_step: int) -> None:
        """Drop rows later than the checkpoint: their steps will be made again."""
        path = self.folder / METRICS_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= last_step]
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())

    def _segment(self, before: Checkpoint | None, progress: Progress) -> tuple[Checkpoint, dict[str, object]]:
        """Advance to the next evaluation and score."""
        config = self.config
        state = before.state if before else self.algorithm.init(config.seed)
        first = before.step if before else 0
        last = min((first // config.evaluate_every + 1) * config.evaluate_every, config.steps)
        began = time.perf_counter()
        state, means = advance(
            self.algorithm,
            state,
            self.train,
            self._hyper(),
            key=randomness.derive(torch.tensor(config.seed, device=config.device), 0),
            steps=range(first, last),
            batch=config.batch,
            on_step=lambda step: progress("training", step, config.steps),
        )
        metrics = {name: float(value) for name, value in means.items()}  # waits for the device
        seconds = (before.seconds if before else 0.0) + time.perf_counter() - began
        scores = self._scores(state)
        accuracy = scores["source_validation_accuracy"]
        best = select(before.best if before else None, last, accuracy)
        kept = self.algorithm.inference(state) if before is None or best.step == last else before.kept
        row: dict[str, object] = {"step": last, **metrics, **scores, "seconds": round(seconds, 3)}
        return Checkpoint(self.fingerprint, last, state, best, kept, seconds), row

    def _scores(self, state: State) -> dict[str, float]:
        tensors: Mapping[str, Tensor] = self.algorithm.inference(state)
        classes = self.model.spec.classes
        domains = [evaluate(self.model, tensors, v.x, v.y, classes) for v in self.validation]
        target = evaluate(self.model, tensors, self.target.x, self.target.y, classes)
        return {
            "source_validation_accuracy": mean_over_domains([accuracy_of(domain) for domain in domains]),
            "target_accuracy": accuracy_of(target),
            "target_macro_f1": macro_f1(target),
        }

    def _hyper(self) -> dict[str, Tensor]:
        values = {**self.algorithm.info.hyper, **self.config.hyper, "lr": self.config.lr}
        return {name: torch.tensor(float(value), device=self.config.device) for name, value in values.items()}


def _step_of(line: str) -> float:
    """The step of a row; infinity for a row that a crash cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
