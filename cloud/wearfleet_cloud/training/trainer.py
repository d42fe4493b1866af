"""A whole training run: split, standardise, train, select, score on the target, write the results."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from wearfleet_models import Classifier, ModelSpec
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.data.dataset import Dataset, Progress, silent
from wearfleet_cloud.data.scenarios import Scenario, SourceSplit
from wearfleet_cloud.data.sensor_kinds import sensor_kinds
from wearfleet_cloud.training.checkpoint import write_atomically
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.examination import Windows
from wearfleet_cloud.training.metrics import confusion_matrix, evaluate
from wearfleet_cloud.training.model_files import save_model
from wearfleet_cloud.training.run import Run, plan_run
from wearfleet_cloud.training.selection import Best
from wearfleet_cloud.training.session import Session
from wearfleet_cloud.training.single import single_run
from wearfleet_cloud.training.summary import summarise

__all__ = ["RESULT_FILE", "TrainResult", "conclude", "model_spec_for", "train"]

RESULT_FILE = "result.json"


@dataclass(frozen=True, slots=True, eq=False)
class TrainResult:
    """What a run came to.

    Args:
        model: with the kept tensors, in evaluation mode.
        split: training and validation windows that were used.
        summary: the content of ``result.json``.
        folder: that holds ``result.json``, ``metrics.jsonl``, ``model.safetensors``, ``model.json``.
    """

    model: Classifier
    split: SourceSplit
    summary: Mapping[str, object]
    folder: Path

    @property
    def target_accuracy(self) -> float:
        """Accuracy on the unseen domain, of the kept step."""
        return float(str(self.summary["target_accuracy"]))


def model_spec_for(dataset: Dataset, backbone: str = "cnn") -> ModelSpec:
    """The network for a data set's windows; kernel lengths of specs/ood.md 1.4, modalities from the channels' names.

    Raises:
        ConfigError: an unknown backbone.
    """
    return ModelSpec(
        backbone,
        len(dataset.channels),
        dataset.window,
        len(dataset.label_names),
        kernel=dataset.kernel,
        modalities=sensor_kinds(dataset.channels) if backbone == "multimodal-transformer" else (),
    )


def train(  # noqa: PLR0917 - what, how, where: callers name them in this order
    scenario: Scenario,
    algorithm: str,
    spec: ModelSpec,
    config: TrainConfig,
    out_dir: Path,
    progress: Progress = silent,
) -> TrainResult:
    """Train a model and write the run into a folder; a run that was interrupted there goes on.

    Args:
        scenario: source domains and the unseen target.
        algorithm: name in ``ALGORITHMS``.
        spec: of the network.
        config: settings.
        out_dir: made when missing.
        progress: called with (what, done, total) after each step.

    Returns:
        The model of the kept step and its scores.

    Raises:
        ConfigError: an unknown algorithm, hyper-parameter, option or device; training diverged.
        ShapeError: the network does not fit the windows.
        DataError: a domain without training or validation windows, or windows that are not finite.
        ConflictError: the folder holds another run.
        IntegrityError: the checkpoint in the folder is damaged.
    """
    run = plan_run(scenario, algorithm, spec, config, out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    runner = single_run(run)
    last = Session(runner, [run], run.fingerprint(), out_dir).finish(progress)
    return conclude(
        run,
        runner.algorithm.model,
        runner.examination.target,
        kept=last.kept,
        best=last.best[0],
        seconds=last.seconds,
        transduced=runner.transduce(dict(last.kept)),
    )


def conclude(
    run: Run,
    model: Classifier,
    target: Windows,
    *,
    kept: Mapping[str, Tensor],
    best: Mapping[str, Best],
    seconds: float,
    stacked: int = 1,
    transduced: Tensor | None = None,
) -> TrainResult:
    """Score what was kept on the target, and write model and result into the run's folder.

    Args:
        run: that was made.
        model: the network; takes the kept tensors.
        target: windows of the unseen domain, on the device of the model.
        kept: named parameters and buffers.
        best: kept step of every selection rule.
        seconds: spent in updates, of all runs of a stack together.
        stacked: runs that advanced together.
        transduced: (N,) classes of the target's windows that the algorithm found, None for those of the network.

    Raises:
        ConfigError: the kept tensors are not finite; nothing is written.
    """
    step = best[run.config.selection].step
    if not all(bool(torch.isfinite(tensor).all()) for tensor in kept.values()):
        raise ConfigError(
            f"training of {run.algorithm} diverged before its first evaluation (step {step}); lower the learning rate "
            f"(--set lr=..., it was {run.config.lr:g}) or what weighs the penalty"
        )
    model.load_state_dict(dict(kept))
    model.eval()
    network = evaluate(model, kept, target.x, target.y, model.spec.classes)
    confusion = None if transduced is None else confusion_matrix(transduced, target.y, model.spec.classes)
    summary = summarise(
        run, model, best=best, network=network, transduced=confusion, seconds=seconds, stacked=stacked
    )
    save_model(model, run.folder)
    write_atomically(run.folder / RESULT_FILE, (json.dumps(summary, indent=2) + "\n").encode())
    return TrainResult(model, run.split, summary, run.folder)
