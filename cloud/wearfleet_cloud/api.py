"""Training in a few lines of Python: the commands ``train`` and ``evaluate`` as functions."""

from collections.abc import Sequence
from pathlib import Path

from wearfleet_models import Classifier

from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.dataset import Dataset, Progress, silent
from wearfleet_cloud.data.prepared import Prepared, default_cache_dir, prepare
from wearfleet_cloud.data.scenarios import build_scenario
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.model_files import load_model
from wearfleet_cloud.training.scoring import Score, score
from wearfleet_cloud.training.settings import run_settings
from wearfleet_cloud.training.trainer import TrainResult
from wearfleet_cloud.training.trainer import train as train_run

__all__ = ["evaluate", "load_dataset", "train"]

Target = int | str | Sequence[str]


def load_dataset(
    dataset: str | Dataset,
    data_root: Path | str | None = None,
    *,
    scenario: str = "cross-person",
    cache_dir: Path | None = None,
) -> Prepared:
    """Open a data set; the first time it is read and cut, afterwards it comes from the cache.

    Args:
        dataset: a name of ``wearfleet-cloud data list``, the path of a .py file that holds ``DATASET``, or a Dataset.
        data_root: folder with the official distributions; None for simulated sets.
        scenario: that it will be used for; some data sets are cut otherwise for some scenarios.
        cache_dir: of prepared data; None for the default.

    Raises:
        ConfigError: an unknown name.
        DataError: the distribution is missing or malformed.
    """
    known = dataset_named(dataset) if isinstance(dataset, str) else dataset
    root = None if data_root is None else Path(data_root)
    return prepare(known.for_scenario(scenario), root, cache_dir or default_cache_dir())


def train(
    data: Prepared,
    algorithm: str = "erm",
    *,
    out: Path | str,
    scenario: str = "cross-person",
    target: Target = 0,
    backbone: str = "cnn",
    steps: int = 3000,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
    **settings: object,
) -> TrainResult:
    """Train on all domains but one, and score on that one; a run that was interrupted in ``out`` goes on.

    Args:
        data: from ``load_dataset``.
        algorithm: a name of ``wearfleet-cloud algorithms``, or the path of a .py file that holds ``ALGORITHM``.
        out: folder of the run.
        scenario: what the domains are.
        target: held-out domain: its number or name; for cross-person also names of persons.
        backbone: name of the network.
        steps: updates.
        seed: of initial weights, splits and all random numbers.
        device: of torch.
        progress: called with (what, done, total) after each step.
        settings: of training, network and algorithm, as ``--set`` takes them: ``lr=0.005, gamma=2.0``.

    Raises:
        ConfigError, DataError, NotFoundError, ConflictError, IntegrityError: as the command does.
    """
    world = build_scenario(scenario, data, _held_out(target), seed)
    config = TrainConfig(steps=steps, seed=seed, device=device)
    texts = [f"{name}={_text(value)}" for name, value in settings.items()]
    spec, config = run_settings(data.dataset, algorithm, config, backbone, texts)
    return train_run(world, algorithm, spec, config, Path(out), progress)


def evaluate(
    model: TrainResult | Classifier | Path | str,
    data: Prepared,
    *,
    scenario: str = "cross-person",
    target: Target = 0,
) -> Score:
    """Accuracy, macro-F1 and confusions of a model on one domain.

    Args:
        model: from ``train``, or the folder of a run.
        data: from ``load_dataset``.
        scenario: what the domains are.
        target: which of them, as for ``train``.

    Raises:
        NotFoundError: no such run, or no such domain.
        ShapeError: the model is for other windows or classes.
    """
    network = model.model if isinstance(model, TrainResult) else model
    if not isinstance(network, Classifier):
        network = load_model(Path(network))
    domain = build_scenario(scenario, data, _held_out(target)).target
    return score(network, domain.x, domain.y, data.dataset.label_names)


def _held_out(target: Target) -> int | tuple[str, ...]:
    if isinstance(target, int):
        return target
    return (target,) if isinstance(target, str) else tuple(target)


def _text(value: object) -> str:
    """As it would be typed after ``--set name=``."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
