"""Small trained models and their exports, made once for all tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from wearfleet_cloud.export import Release, ReleaseInfo, export_classifier
from wearfleet_models import Classifier, ModelSpec, build_classifier
from wearfleet_protos.plan import InputContract
from wearfleet_protos.recording import Channel

LABELS = ("rest", "slow", "middle", "fast")
CONTRACT = InputContract(
    channels=tuple(Channel(f"acc_{axis}", "m/s^2") for axis in "xyz"),
    rate_hz=50.0,
    window=64,
    stride=32,
    labels=LABELS,
)
INFO = ReleaseInfo("tiny", 3, "run-1", "Apache-2.0", simulated=True, created_ns=5)


@dataclass(frozen=True)
class Example:
    """A trained model, the windows it saw, and what came out of its export."""

    model: Classifier
    contract: InputContract
    info: ReleaseInfo
    x: np.ndarray
    y: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    release: Release


def oscillations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows (count, 3, 64) whose class is their frequency, class 3 five times rarer than the others."""
    rng = np.random.default_rng(seed)
    y = rng.choice(4, size=count, p=[0.31, 0.31, 0.31, 0.07])
    time = np.arange(64) / 50.0
    phase = rng.uniform(0, 2 * np.pi, (count, 3, 1))
    frequency = np.array([0.0, 2.0, 5.0, 9.0])[y][:, None, None]
    x = 3.0 * np.sin(2 * np.pi * frequency * time + phase) + rng.normal(0, 0.7, (count, 3, 64)) + 9.8
    return x.astype(np.float32), y.astype(np.int64)


def _train(spec: ModelSpec, x: np.ndarray, y: np.ndarray) -> Classifier:
    model = build_classifier(spec, seed=1)
    model.standardise.mean.copy_(torch.from_numpy(x.mean(axis=(0, 2))))
    model.standardise.std.copy_(torch.from_numpy(x.std(axis=(0, 2))))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        index = torch.randint(len(x), (64,), generator=generator)
        optimiser.zero_grad()
        logits = model(torch.from_numpy(x)[index])
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)[index]).backward()
        optimiser.step()
    return model.eval()


def _example(spec: ModelSpec, method: str) -> Example:
    x, y = oscillations(600, seed=0)
    x_validation, y_validation = oscillations(200, seed=1)
    model = _train(spec, x, y)
    release = export_classifier(
        model, CONTRACT, INFO, x=x, y=y, x_validation=x_validation, method=method, rank=8
    )
    return Example(model, CONTRACT, INFO, x, y, x_validation, y_validation, release)


@pytest.fixture(scope="session")
def cnn() -> Example:
    return _example(ModelSpec("cnn", 3, 64, 4), "mahalanobis")


@pytest.fixture(scope="session")
def transformer() -> Example:
    return _example(ModelSpec("transformer", 3, 64, 4, feedforward=32), "energy")


@pytest.fixture(params=["cnn", "transformer"])
def example(request: pytest.FixtureRequest) -> Example:
    """Both backbones, and with them both scores."""
    return request.getfixturevalue(request.param)
