"""Read a training run back: its model, and the very windows it was trained and validated on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from wearfleet_models import Classifier
from wearfleet_protos.errors import DataError, IntegrityError, NotFoundError
from wearfleet_protos.plan import InputContract
from wearfleet_protos.tensors import digest_of

from wearfleet_cloud.data.dataset import Dataset
from wearfleet_cloud.data.left_out import leave_out
from wearfleet_cloud.data.prepared import Prepared
from wearfleet_cloud.data.scenarios import Domain, Scenario, build_scenario, split_sources
from wearfleet_cloud.training.model_files import load_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Run", "RunWindows", "contract_of", "read_run", "scenario_of_run", "windows_of_run"]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A finished training run.

    Args:
        identity: data set, algorithm and a hash of the result.
        model: in evaluation mode.
        dataset: name or file it was trained on.
        scenario: what its domains were.
        target: persons, or the name of the domain, that were held out.
        scenario_seed: of the split into training and validation.
        split: rule of that split.
        counts: number of training and of validation windows.
        labels: the classes of its windows, in class order.
        transductive: whether its scores on the target are those of classes found with the target's windows at hand,
            which the model alone does not give.
    """

    identity: str
    model: Classifier
    dataset: str
    scenario: str
    target: tuple[str, ...]
    scenario_seed: int
    split: str
    counts: tuple[int, int]
    labels: tuple[str, ...]
    transductive: bool


@dataclass(frozen=True, slots=True, eq=False)
class RunWindows:
    """Raw source windows of a run: ``x`` (n, C, T), ``y`` (n,) for training, the others for validation."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    x_validation: NDArray[np.float32]
    y_validation: NDArray[np.int64]


def read_run(folder: Path) -> Run:
    """Read ``result.json`` and the model of a run.

    Raises:
        NotFoundError: no finished run in that folder.
        IntegrityError: a file is damaged.
        ShapeError: the tensors do not fit the network.
    """
    file = folder / "result.json"
    if not file.is_file():
        raise NotFoundError(
            f"{file} does not exist; give --run the folder of a finished `wearfleet-cloud train`"
        )
    content = file.read_bytes()
    try:
        result: dict[str, Any] = json.loads(content)
        return Run(
            identity=f"{result['dataset']}-{result['algorithm']}-{digest_of(content)[7:19]}",
            model=load_model(folder),
            dataset=str(result["dataset"]),
            scenario=str(result["scenario"]),
            target=_target_of(result),
            scenario_seed=int(result["scenario_seed"]),
            split=str(result["split"]),
            counts=(int(result["train_windows"]), int(result["validation_windows"])),
            labels=tuple(str(label) for label in result["labels"]),
            transductive=bool(result.get("transductive", False)),  # runs of before it was written never were
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{file} is not the result of a training run ({error!r}); train again"
        ) from error


def windows_of_run(run: Run, prepared: Prepared) -> RunWindows:
    """The source windows, split as they were for training.

    Raises:
        DataError: the data set found here is not the one that the run saw.
        NotFoundError: a held-out subject is not in it.
    """
    scenario = scenario_of_run(run, prepared)
    split = split_sources(scenario, run.split)
    x, y = _joined(split.train)
    x_validation, y_validation = _joined(split.validation)
    if (len(y), len(y_validation)) != run.counts:
        raise DataError(
            f"the run was trained and validated on {run.counts} windows, data set {prepared.dataset.name} found here "
            f"gives {(len(y), len(y_validation))}; point --data-root at the data of the run"
        )
    return RunWindows(x, y, x_validation, y_validation)


def scenario_of_run(run: Run, prepared: Prepared) -> Scenario:
    """The domains as the run saw them, without the activities that it left out.

    Args:
        run: which one.
        prepared: its data set, with all activities.

    Raises:
        ConfigError: the data set found here has other activities.
        NotFoundError: a held-out subject is not in it.
    """
    left_out = [name for name in prepared.dataset.label_names if name not in run.labels]
    return build_scenario(run.scenario, leave_out(prepared, left_out), run.target, run.scenario_seed)


def contract_of(dataset: Dataset, labels: tuple[str, ...] = ()) -> InputContract:
    """What a window of this data set looks like; ``labels``: the classes of a run that did not have them all."""
    return InputContract(
        channels=dataset.channels,
        rate_hz=dataset.rate_hz,
        window=dataset.window,
        stride=dataset.stride,
        labels=labels or dataset.label_names,
    )


def _target_of(result: dict[str, Any]) -> tuple[str, ...]:
    """Persons by their own names, any other domain by its name."""
    if result["scenario"] == "cross-person":
        return tuple(str(subject) for subject in result["target_subjects"])
    return (str(result["target"]),)


def _joined(domains: tuple[Domain, ...]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return np.concatenate([d.x for d in domains]), np.concatenate([d.y for d in domains])
