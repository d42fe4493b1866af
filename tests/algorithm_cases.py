"""Small problems on which every algorithm of the registry can make a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from wearfleet_cloud.algorithms import ALGORITHMS, Algorithm, Batch, State, build_algorithm, network_of
from wearfleet_cloud.training.loop import Resident
from wearfleet_cloud.training.optimisers import Optimiser
from wearfleet_models import Classifier, ModelSpec, build_classifier

__all__ = ["CHOICES", "DOMAINS", "batch", "build", "data", "hyper", "model", "started", "step"]

DOMAINS: Final = 3
CLASSES: Final = 4

CHOICES: Final = [
    (name, options)
    for name, kind in ALGORITHMS.items()
    for options in (
        {},
        *({option: value} for option, values in kind.info.options.items() for value in values[1:]),
    )
]
"""Every algorithm as it is by default, and with each other value of each of its options."""


def model(
    name: str = "erm",
    options: Mapping[str, str] | None = None,
    *,
    backbone: str = "cnn",
    seed: int = 0,
    domains: int = DOMAINS,
) -> Classifier:
    """The network an algorithm trains on the small problem, in training mode."""
    spec = ModelSpec(backbone, 3, 40, CLASSES, kernel=5, feedforward=16, neck_width=8)
    return build_classifier(network_of(name, spec, domains, options or {}), seed).train()


def build(
    name: str,
    optimiser: Optimiser,
    options: Mapping[str, str] | None = None,
    *,
    backbone: str = "cnn",
    seed: int = 0,
    domains: int = DOMAINS,
) -> Algorithm:
    """An algorithm bound to a fresh network."""
    network = model(name, options, backbone=backbone, seed=seed, domains=domains)
    return build_algorithm(name, network, optimiser, options, domains=domains)


def data(windows: int = 24, domains: int = DOMAINS, seed: int = 1) -> Resident:
    """Random windows of shifted domains; every class in every domain."""
    generator = torch.Generator().manual_seed(seed)
    total = domains * windows
    domain = torch.arange(domains).repeat_interleave(windows)
    y = torch.arange(total) % CLASSES
    x = torch.randn(total, 40, 3, generator=generator) + 0.3 * domain[:, None, None] + 0.2 * y[:, None, None]
    count = torch.full((domains,), windows)
    return Resident(x, y, domain, count.cumsum(0) - count, count, (windows,) * domains)


def batch(algorithm: Algorithm, windows: int = 6, seed: int = 1, domains: int = DOMAINS) -> Batch:
    """A batch of the shape the algorithm asks for when ``windows`` a domain are wanted, out of :func:`data`."""
    shape = algorithm.shape(windows)
    source = data(domains=domains)
    generator = torch.Generator().manual_seed(seed)
    if shape[0] == domains:
        drawn = torch.randint(0, source.sizes[0], shape, generator=generator) + source.first[:, None]
    else:
        drawn = torch.randint(0, sum(source.sizes), shape, generator=generator)
    return source.batch(drawn)


_SHORT: Final = {"teacher_steps": 2.0}
"""Hyper-parameters that make the small problem a long one by default."""


def hyper(algorithm: Algorithm, **values: float) -> dict[str, Tensor]:
    """The default hyper-parameters, with some changed."""
    short = {name: value for name, value in _SHORT.items() if name in algorithm.info.hyper}
    given = {"lr": 0.05, **algorithm.info.hyper, **short, **values}
    return {name: torch.tensor(float(value)) for name, value in given.items()}


def started(algorithm: Algorithm, seed: int = 0, pass_steps: int = 4, **values: float) -> State:
    """The state from which the first step starts."""
    state = algorithm.init(seed)
    if algorithm.refresh_at(0, pass_steps):
        state = algorithm.refresh(state, data(), hyper(algorithm, **values), torch.tensor(3))
    return state


def step(
    algorithm: Algorithm, state: State, given: Batch, rng: int = 0, **values: float
) -> tuple[State, dict[str, Tensor]]:
    """One step with the default hyper-parameters, some of them changed."""
    return algorithm.step(state, given, hyper(algorithm, **values), torch.tensor(rng))
