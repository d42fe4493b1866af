"""One run to make: what is trained, on which windows, with which settings, into which folder."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from wearfleet_models import ModelSpec, build_classifier
from wearfleet_protos.errors import ConfigError, DataError, ShapeError

from wearfleet_cloud.algorithms import Algorithm, algorithm_info, build_algorithm, network_of
from wearfleet_cloud.data.scenarios import Scenario, SourceSplit, split_sources
from wearfleet_cloud.data.standardisation import STANDARDISATIONS
from wearfleet_cloud.training.config import TrainConfig

__all__ = ["Run", "plan_run"]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A run that can be made.

    Args:
        scenario: source domains and the unseen target.
        split: training and held-out windows of the source domains.
        algorithm: name in ``ALGORITHMS``, or the path of a user's file.
        spec: of the network that was asked for.
        config: settings.
        folder: of its files.
    """

    scenario: Scenario
    split: SourceSplit
    algorithm: str
    spec: ModelSpec
    config: TrainConfig
    folder: Path

    def build(self) -> Algorithm:
        """The algorithm bound to its network: fresh weights, standardisation of the training windows."""
        config, domains = self.config, len(self.split.train)
        spec = network_of(self.algorithm, self.spec, domains, config.options)
        model = build_classifier(spec, config.seed)
        mean, std = STANDARDISATIONS[config.standardise]([domain.x for domain in self.split.train])
        model.standardise.mean.copy_(torch.from_numpy(mean))
        model.standardise.std.copy_(torch.from_numpy(std))
        return build_algorithm(
            self.algorithm,
            model.to(config.device),
            config.build_optimiser(),
            config.options,
            domains=domains,
        )

    def hyper(self) -> dict[str, float]:
        """All hyper-parameters that the step reads, "lr" among them."""
        return {**algorithm_info(self.algorithm).hyper, **self.config.hyper, "lr": self.config.lr}

    def fingerprint(self) -> str:
        """Hash of all that decides the numbers of the run."""
        scenario = self.scenario
        settings = [self.algorithm, scenario.name, scenario.seed, asdict(self.spec), asdict(self.config)]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for domain in (*self.split.train, *self.split.validation, scenario.target):
            digest.update(domain.name.encode())
            digest.update(np.ascontiguousarray(domain.x).data)
            digest.update(np.ascontiguousarray(domain.y).data)
        return digest.hexdigest()

    def split_hash(self) -> str:
        """Short hash of which windows train, validate and test."""
        digest = hashlib.sha256()
        for domain in (*self.split.train, *self.split.validation, self.scenario.target):
            digest.update(f"{domain.name}:{len(domain)};".encode())
            digest.update(np.ascontiguousarray(domain.index).data)
        return digest.hexdigest()[:16]


def plan_run(scenario: Scenario, algorithm: str, spec: ModelSpec, config: TrainConfig, folder: Path) -> Run:
    """Check that a run can be made, and split its source domains. Nothing is written.

    Raises:
        ConfigError: an unknown algorithm, hyper-parameter, option or device.
        ShapeError: the network does not fit the windows.
        DataError: the split is impossible, a source domain has no window to train or to validate on, or windows hold
            NaN or infinity.
    """
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
    _check_windows(scenario)
    return Run(scenario, split_sources(scenario, config.split), algorithm, spec, config, folder)


def _check_windows(scenario: Scenario) -> None:
    for domain in (*scenario.sources, scenario.target):
        broken = ~np.isfinite(domain.x).all(axis=(1, 2))
        if broken.any():
            raise DataError(
                f"{int(broken.sum())} of {len(domain)} windows of {domain.name} hold NaN or infinity; the reader must "
                "interpolate or split there"
            )
