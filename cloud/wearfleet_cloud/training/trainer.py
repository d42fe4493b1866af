"""A whole training run: split, standardise, train, select, score on the target, write the results."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from wearfleet_models import Classifier, ModelSpec, build_classifier
from wearfleet_protos.errors import ConfigError, ShapeError

from wearfleet_cloud.algorithms import algorithm_info, build_algorithm, network_of
from wearfleet_cloud.data.dataset import Dataset, Progress, silent
from wearfleet_cloud.data.scenarios import Scenario, SourceSplit, split_sources
from wearfleet_cloud.data.standardisation import standardisation_of
from wearfleet_cloud.training.checkpoint import Checkpoint, write_atomically
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.loop import resident
from wearfleet_cloud.training.metrics import accuracy_of, evaluate, macro_f1
from wearfleet_cloud.training.model_files import save_model
from wearfleet_cloud.training.selection import SOURCE_VALIDATION
from wearfleet_cloud.training.session import Session, on_device

__all__ = ["TrainResult", "model_spec_for", "train"]

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
    """The network for a data set's windows; kernel lengths of specs/ood.md 1.4.

    Raises:
        ConfigError: an unknown backbone.
    """
    return ModelSpec(
        backbone, len(dataset.channels), dataset.window, len(dataset.label_names), kernel=dataset.kernel
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
        ConfigError: an unknown algorithm, hyper-parameter, option or device.
        ShapeError: the network does not fit the windows.
        DataError: a domain without training or validation windows.
        ConflictError: the folder holds another run.
        IntegrityError: the checkpoint in the folder is damaged.
    """
    _check(scenario, algorithm, spec, config)
    out_dir.mkdir(parents=True, exist_ok=True)
    split = split_sources(scenario, config.split)
    session = _session(scenario, split, algorithm=algorithm, spec=spec, config=config, folder=out_dir)
    last = session.run(progress)
    session.model.load_state_dict(dict(last.kept))
    model = session.model.eval()
    summary = _summary(scenario, split, session, last)
    save_model(model, out_dir)
    write_atomically(out_dir / RESULT_FILE, (json.dumps(summary, indent=2) + "\n").encode())
    return TrainResult(model, split, summary, out_dir)


def _check(scenario: Scenario, algorithm: str, spec: ModelSpec, config: TrainConfig) -> None:
    dataset = scenario.prepared.dataset
    wanted = (len(dataset.channels), dataset.window, len(dataset.label_names))
    if (spec.channels, spec.window, spec.classes) != wanted:
        raise ShapeError(
            f"data set {dataset.name} has (channels, window, classes) = {wanted}, the network is for "
            f"{(spec.channels, spec.window, spec.classes)}; use model_spec_for"
        )
    known = algorithm_info(algorithm).hyper
    for name in config.hyper:
        if name not in known:
            raise ConfigError(
                f"{algorithm} has no hyper-parameter {name!r}; it has: {', '.join(known) or 'none'}"
            )
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {config.device!r} cannot be used here ({error}); use --device cpu"
        ) from error


def _session(
    scenario: Scenario,
    split: SourceSplit,
    *,
    algorithm: str,
    spec: ModelSpec,
    config: TrainConfig,
    folder: Path,
) -> Session:
    device = torch.device(config.device)
    domains = len(split.train)
    model = build_classifier(network_of(algorithm, spec, domains, config.options), config.seed)
    mean, std = standardisation_of([domain.x for domain in split.train])
    model.standardise.mean.copy_(torch.from_numpy(mean))
    model.standardise.std.copy_(torch.from_numpy(std))
    model.to(device)
    return Session(
        algorithm=build_algorithm(
            algorithm, model, config.build_optimiser(), config.options, domains=domains
        ),
        model=model,
        config=config,
        fingerprint=_fingerprint(scenario, split, algorithm, spec, config),
        train=resident([(domain.x, domain.y) for domain in split.train], device),
        validation=[on_device(domain.x, domain.y, device) for domain in split.validation],
        target=on_device(scenario.target.x, scenario.target.y, device),
        folder=folder,
    )


def _fingerprint(
    scenario: Scenario, split: SourceSplit, algorithm: str, spec: ModelSpec, config: TrainConfig
) -> str:
    """Hash of all that decides the numbers of a run."""
    settings = [algorithm, scenario.name, scenario.seed, asdict(spec), asdict(config)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for domain in (*split.train, *split.validation, scenario.target):
        digest.update(domain.name.encode())
        digest.update(np.ascontiguousarray(domain.x).data)
        digest.update(np.ascontiguousarray(domain.y).data)
    return digest.hexdigest()


def _summary(scenario: Scenario, split: SourceSplit, session: Session, last: Checkpoint) -> dict[str, object]:
    info, config, dataset = session.algorithm.info, session.config, scenario.prepared.dataset
    target = evaluate(
        session.model, last.kept, session.target.x, session.target.y, session.model.spec.classes
    )
    return {
        "target_accuracy": accuracy_of(target),
        "target_macro_f1": macro_f1(target),
        "source_validation_accuracy": last.best.accuracy,
        "steps_per_second": round(last.step / last.seconds, 2),
        "algorithm": info.name,
        "hyper": {**info.hyper, **config.hyper, "lr": config.lr},
        "options": {**{name: known[0] for name, known in info.options.items()}, **config.options},
        "selection": SOURCE_VALIDATION,
        "selected_step": last.best.step,
        "seed": config.seed,
        "commit": _commit(),
        "dataset": dataset.name,
        "simulated": dataset.simulated,
        "scenario": scenario.name,
        "target": scenario.target.name,
        "target_subjects": list(scenario.target.subjects),
        "scenario_seed": scenario.seed,
        "source_domains": [domain.name for domain in scenario.sources],
        "split": config.split,
        "train_windows": sum(len(domain) for domain in split.train),
        "validation_windows": sum(len(domain) for domain in split.validation),
        "leaking_windows": split.leaking,
        "target_windows": len(scenario.target),
        "target_confusion": target.tolist(),
        "labels": list(dataset.label_names),
        "model": session.model.spec.to_dict(),
        "config": asdict(config),
        "train_seconds": round(last.seconds, 3),
        "torch": torch.__version__,
    }


def _commit() -> str:
    """The commit of a source checkout, else the version of the installed package."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return version("wearfleet")
    return done.stdout.strip()
