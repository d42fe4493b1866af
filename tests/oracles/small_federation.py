"""A small federated problem: models, contract and windows for the tests of plans."""

import numpy as np
from wearfleet_models.classifier import Classifier, ModelSpec, build_classifier
from wearfleet_protos.plan import InputContract
from wearfleet_protos.recording import Channel
from wearfleet_protos.windowing import LabelledWindows

CHANNELS, WINDOW, CLASSES = 3, 40, 4

CONTRACT = InputContract(
    tuple(Channel(name, "m/s2") for name in ("x", "y", "z")), 20.0, WINDOW, 20, ("a", "b", "c", "d")
)


def model(backbone: str, seed: int = 0, window: int = WINDOW) -> Classifier:
    return build_classifier(
        ModelSpec(backbone, CHANNELS, window, CLASSES, kernel=5, feedforward=32),  # type: ignore[arg-type]
        seed,
    )


def windows(count: int, seed: int) -> LabelledWindows:
    """Windows whose class shows in their frequency and mean."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, CLASSES, count)
    time = np.arange(WINDOW) / 20.0
    wave = np.sin(2 * np.pi * (1 + y)[:, None] * time + generator.uniform(0, 6, (count, 1)))
    x = wave[:, None, :] * generator.uniform(0.5, 1.5, (count, CHANNELS, 1)) + generator.normal(
        0, 0.3, (count, CHANNELS, WINDOW)
    )
    rows = np.arange(count, dtype=np.int64)
    return LabelledWindows(x.astype(np.float32), y.astype(np.int64), rows, np.zeros_like(rows))


def splits(seed: int, train: int = 45, holdout: int = 21) -> dict[str, LabelledWindows]:
    """A client's windows; neither part is a multiple of the batch size of 16."""
    return {"train": windows(train, 2 * seed), "holdout": windows(holdout, 2 * seed + 1)}


def arrays(of: Classifier) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in of.state_dict().items()}
