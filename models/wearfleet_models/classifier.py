"""The whole model: raw window in, logits out."""

from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from wearfleet_protos.errors import ConfigError

from wearfleet_models.backbones import Cnn, Transformer
from wearfleet_models.layers import Standardise

__all__ = ["Classifier", "ModelSpec", "build_classifier"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything needed to build the same network again.

    Args:
        backbone: "cnn" or "transformer".
        channels: C of a window.
        window: T of a window, samples.
        classes: K.
        kernel: length of the convolutions (cnn).
        dropout: share of dropped activations (transformer).
        feedforward: width of the feed-forward blocks (transformer).

    Raises:
        ConfigError: an unknown backbone or a size below one.
    """

    backbone: str
    channels: int
    window: int
    classes: int
    kernel: int = 9
    dropout: float = 0.2
    feedforward: int = 2048

    def __post_init__(self) -> None:
        if self.backbone not in ("cnn", "transformer"):
            raise ConfigError(f"unknown backbone {self.backbone!r}; known: cnn, transformer")
        for field in ("channels", "window", "classes", "kernel", "feedforward"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field} of the model must be a whole number of at least 1, got {value!r}")

    def to_dict(self) -> dict[str, object]:
        """The fields, for JSON; ``ModelSpec(**d)`` is the inverse."""
        return asdict(self)


class Backbone(Protocol):
    """From a standardised window to features."""

    num_features: int

    def __call__(self, x: Tensor, weight: Tensor | None, rng: Tensor | None) -> Tensor:
        """(B, C, T), (B,), () -> (B, num_features)."""


class Classifier(nn.Module):
    """Standardise, backbone, linear head.

    ``standardise`` holds the statistics of the training data, so a window enters in raw units.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.standardise = Standardise(spec.channels)
        self.backbone = _backbone(spec)
        self.head = nn.Linear(self.backbone.num_features, spec.classes)

    def features(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:
        """Features of raw windows.

        Args:
            x: (B, C, T) raw units.
            weight: (B,) weight of each window in batch statistics, None for ones.
            rng: () int64 key of the dropout masks, None for no dropout.

        Returns:
            (B, F).
        """
        features: Tensor = self.backbone(self.standardise(x), weight, rng)
        return features

    def forward(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:
        """Logits (B, K) of raw windows; arguments as in ``features``."""
        logits: Tensor = self.head(self.features(x, weight, rng))
        return logits


def build_classifier(spec: ModelSpec, seed: int = 0) -> Classifier:
    """A freshly initialised model; the same spec and seed give the same weights.

    Args:
        spec: the architecture.
        seed: of the initial weights; torch's global generator is left as it was.

    Raises:
        ConfigError: the window is too short for the backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(spec)


def _backbone(spec: ModelSpec) -> Cnn | Transformer:
    if spec.backbone == "cnn":
        return Cnn(spec.channels, spec.window, spec.kernel)
    return Transformer(spec.channels, spec.window, dropout=spec.dropout, feedforward=spec.feedforward)
