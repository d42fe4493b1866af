"""The runs of a benchmark: data sets x scenarios x backbones x methods x targets x configurations x seeds."""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.algorithms import algorithm_info
from wearfleet_cloud.training.benchmark.ranges import drawn_settings
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.settings import known_settings

__all__ = ["Cell", "Grid", "cells", "setting_name"]


@dataclass(frozen=True, slots=True)
class Grid:
    """What is compared.

    Args:
        datasets: names, or paths of users' files.
        scenarios: names; one that a data set cannot give is left out for it.
        methods: ``name``, or ``name:option=value:...`` for an algorithm that is not as by default.
        targets: as given to ``train --target``; empty for every domain.
        backbones: names.
        seeds: of splits, initial weights and all random numbers.
        configurations: hyper-parameter settings a method; the first is the defaults, the others are drawn.
        steps: updates a run.
        settings: "name=value" for every run that has such a setting.
        device: of torch.

    Raises:
        ConfigError: nothing to run, something given twice, or an unknown algorithm, option or setting.
    """

    datasets: tuple[str, ...]
    scenarios: tuple[str, ...]
    methods: tuple[str, ...]
    targets: tuple[str, ...]
    backbones: tuple[str, ...]
    seeds: tuple[int, ...]
    configurations: int
    steps: int
    settings: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("datasets", "scenarios", "methods", "backbones", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"a benchmark needs {name}, each once, got {list(values) or 'none'}")
        if self.configurations < 1:
            raise ConfigError(f"a benchmark needs at least 1 configuration, got {self.configurations}")
        TrainConfig(steps=self.steps, seed=max(self.seeds))
        known = {name for method in self.methods for name in known_settings(_parted(method)[0])}
        for setting in self.settings:
            if setting_name(setting) not in known:
                raise ConfigError(f"no method has a setting {setting!r}; known: {', '.join(sorted(known))}")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a grid: the arguments of ``wearfleet-cloud train``, and where it stands in the grid.

    Args:
        dataset, scenario, target, algorithm, backbone, seed, steps, device, settings: as of ``train``.
        method: as given for the grid.
        configuration: number of its hyper-parameter setting.
    """

    dataset: str
    scenario: str
    backbone: str
    method: str
    target: str
    configuration: int
    seed: int
    steps: int
    device: str
    algorithm: str
    settings: tuple[str, ...]

    @property
    def id(self) -> str:
        """A name of its own for every different run, fit for a folder."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{algorithm_info(self.algorithm).name}-c{self.configuration}-s{self.seed}-{digest}"

    def command(self) -> str:
        """The command line that makes this run again."""
        options = {
            "dataset": self.dataset,
            "scenario": self.scenario,
            "target": self.target,
            "algorithm": self.algorithm,
            "backbone": self.backbone,
            "steps": str(self.steps),
            "seed": str(self.seed),
            "device": self.device,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        words += [word for setting in self.settings for word in ("--set", setting)]
        return shlex.join(["wearfleet-cloud", "train", *words, "--out", "DIR"])


def cells(grid: Grid, domains: Callable[[str, str], int]) -> Iterator[Cell]:
    """All runs of a grid, in the order of its table.

    Args:
        grid: what is compared.
        domains: number of domains of (data set, scenario), 0 when the data cannot give the scenario.
    """
    for dataset, scenario in product(grid.datasets, grid.scenarios):
        targets = grid.targets or tuple(map(str, range(domains(dataset, scenario))))
        if domains(dataset, scenario) == 0:
            continue
        for backbone, method, target in product(grid.backbones, grid.methods, targets):
            algorithm, settings = _settings(grid, method)
            fixed = frozenset(map(setting_name, settings))
            for configuration, seed in product(range(grid.configurations), grid.seeds):
                drawn = drawn_settings(algorithm, configuration, fixed)
                yield Cell(
                    dataset=dataset,
                    scenario=scenario,
                    backbone=backbone,
                    method=method,
                    target=target,
                    configuration=configuration,
                    seed=seed,
                    steps=grid.steps,
                    device=grid.device,
                    algorithm=algorithm,
                    settings=(*settings, *drawn),
                )


def setting_name(setting: str) -> str:
    """``name`` of ``name=value``."""
    return setting.partition("=")[0]


def _settings(grid: Grid, method: str) -> tuple[str, tuple[str, ...]]:
    """Algorithm and settings of a method: those of the grid that it has, and its own."""
    algorithm, own = _parted(method)
    known = known_settings(algorithm)
    return algorithm, (*(s for s in grid.settings if setting_name(s) in known), *own)


def _parted(method: str) -> tuple[str, tuple[str, ...]]:
    algorithm, *own = method.split(":")
    for setting in own:
        if setting_name(setting) not in known_settings(algorithm) or "=" not in setting:
            raise ConfigError(f"method {method!r}: {algorithm} has no setting {setting!r}")
    return algorithm, tuple(own)
