"""What a finished run came to: the content of ``result.json``, everything needed to repeat it included."""

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from wearfleet_models import Classifier

from wearfleet_cloud.algorithms import algorithm_info
from wearfleet_cloud.training.metrics import accuracy_of, macro_f1
from wearfleet_cloud.training.run import Run
from wearfleet_cloud.training.selection import Best

__all__ = ["summarise"]


def summarise(
    run: Run,
    model: Classifier,
    *,
    best: Mapping[str, Best],
    network: Tensor,
    transduced: Tensor | None,
    seconds: float,
    stacked: int = 1,
) -> dict[str, object]:
    """The summary of a run.

    Args:
        run: that was made.
        model: the network that was kept.
        best: kept step of every selection rule.
        network: (K, K) confusion matrix of ``model`` on the unseen domain.
        transduced: (K, K) that of the classes which the algorithm found with the target's windows at hand, unlabelled;
            the scores are then its. None for none.
        seconds: spent in updates, of all runs of a stack together.
        stacked: runs that advanced together.
    """
    config, kept = run.config, best[run.config.selection]
    target = network if transduced is None else transduced
    return {
        "target_accuracy": accuracy_of(target),
        "target_macro_f1": macro_f1(target),
        "transductive": transduced is not None,
        "network_target_accuracy": accuracy_of(network),
        "source_validation_accuracy": kept.scores.source_validation_accuracy,
        "steps_per_second": round(config.steps * stacked / seconds, 2),
        **_method(run),
        "selection": config.selection,
        "selected_step": kept.step,
        "selections": {rule: {"step": b.step, **asdict(b.scores)} for rule, b in best.items()},
        "seed": config.seed,
        **_provenance(),
        **_data(run),
        "target_confusion": target.tolist(),
        "model": model.spec.to_dict(),
        "config": asdict(config),
        "stacked": stacked,
        "train_seconds": round(seconds / stacked, 3),
    }


def _method(run: Run) -> dict[str, object]:
    info = algorithm_info(run.algorithm)
    return {
        "algorithm": info.name,
        "hyper": run.hyper(),
        "options": {
            **{name: known[0] for name, known in info.options.items()},
            **run.config.options,
        },
    }


def _data(run: Run) -> dict[str, object]:
    scenario, split = run.scenario, run.split
    dataset = scenario.prepared.dataset
    return {
        "dataset": dataset.name,
        "simulated": dataset.simulated,
        "scenario": scenario.name,
        "target": scenario.target.name,
        "target_subjects": list(scenario.target.subjects),
        "scenario_seed": scenario.seed,
        "source_domains": [domain.name for domain in scenario.sources],
        "split": run.config.split,
        "standardise": run.config.standardise,
        "split_hash": run.split_hash(),
        "train_windows": sum(len(domain) for domain in split.train),
        "validation_windows": sum(len(domain) for domain in split.validation),
        "leaking_windows": split.leaking,
        "target_windows": len(scenario.target),
        "labels": list(dataset.label_names),
    }


def _provenance() -> dict[str, object]:
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


@cache
def _commit() -> str:
    """The commit of a source checkout, else the version of the installed package."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return version("wearfleet")
    return done.stdout.strip()
