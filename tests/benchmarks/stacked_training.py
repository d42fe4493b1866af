"""Runs of the benchmark's configuration that advance together, as ``train_stacked`` advances them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from wearfleet_cloud.data.dataset import INERTIAL6
from wearfleet_cloud.data.prepared import Prepared
from wearfleet_cloud.data.scenarios import Domain, Scenario, SourceSplit
from wearfleet_cloud.data.simulator import SIMULATOR
from wearfleet_cloud.data.windows import WindowSet
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.run import Run
from wearfleet_cloud.training.stacked import stacked_runs
from wearfleet_models import ModelSpec

__all__ = ["stacked_loop"]

_WINDOWS, _CLASSES = 1500, 6


def stacked_loop(algorithm: str, count: int) -> Callable[[int], None]:
    """A function that makes so many steps of each of ``count`` runs with seeds of their own."""
    scenario = _scenario()
    config = TrainConfig(weight_decay=5e-4, device=str(torch.get_default_device()))
    spec = ModelSpec("cnn", 6, 128, _CLASSES)
    split = SourceSplit(scenario.sources, scenario.sources, 0)
    runs = [
        Run(scenario, split, algorithm, spec, replace(config, seed=seed), Path()) for seed in range(count)
    ]
    with torch.device("cpu"):  # networks are built where a seed gives the same weights
        stack = stacked_runs(runs)
        state = stack.init()
    made = 0

    def run(steps: int) -> None:
        nonlocal state, made
        state, metrics = stack.make_steps(state, range(made, made + steps), lambda _: None)
        made += steps
        metrics["loss"].tolist()

    return run


def _scenario() -> Scenario:
    """Four source domains of random windows, and a small target."""
    generator = np.random.default_rng(0)
    total = 4 * _WINDOWS + 64
    column, number = np.full(total, "a"), np.arange(total)
    x = generator.standard_normal((total, 6, 128), dtype=np.float32)
    y = generator.integers(0, _CLASSES, total)
    windows = WindowSet(x, y, column, column, column, column, number, number)
    dataset = replace(SIMULATOR, channels=INERTIAL6, window=128)
    data = Prepared(dataset, windows, (), np.zeros((0, 6), np.float32), np.zeros(0, np.int16))
    parts = [number[first : first + _WINDOWS] for first in range(0, total, _WINDOWS)]
    domains = [Domain(f"domain {k}", (), x[part], y[part], part) for k, part in enumerate(parts)]
    return Scenario("cross-person", data, tuple(domains[:4]), domains[4], 0)
