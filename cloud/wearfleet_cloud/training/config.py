"""Settings of one training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.data.standardisation import STANDARDISATIONS
from wearfleet_cloud.training.optimisers import Adam, Lars, Optimiser, Sgd
from wearfleet_cloud.training.selection import RULES, SOURCE_VALIDATION

__all__ = ["TrainConfig"]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of one training run; the defaults are those for production (specs/ood.md 7.2).

    Args:
        steps: number of updates.
        batch: windows a source domain in one step, drawn with replacement.
        lr: learning rate.
        optimiser: "adam", "sgd" or "lars".
        betas: of Adam.
        momentum: of SGD and LARS.
        weight_decay: coupled, added to the gradient.
        seed: of the initial weights and of every random number of the run.
        evaluate_every: steps between evaluations, which are also the checkpoints.
        split: rule that makes the source-validation sets: "block" of time, "person" or "stratified".
        standardise: what is done to every channel before the network, a key of ``STANDARDISATIONS``; fitted on the
            training windows of the sources and part of the model.
        selection: rule that chooses the step whose tensors are kept, a key of ``RULES``.
        hyper: hyper-parameters of the algorithm that differ from their defaults.
        options: options of the algorithm that differ from their defaults.
        device: of torch, for example "cpu" or "cuda".

    Raises:
        ConfigError: a value is out of its range.
    """

    steps: int = 3000
    batch: int = 32
    lr: float = 1e-3
    optimiser: Literal["adam", "sgd", "lars"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    evaluate_every: int = 100
    split: str = "block"
    standardise: str = "zscore"
    selection: str = SOURCE_VALIDATION
    hyper: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0.0:
            raise ConfigError(f"the learning rate must be above 0, got {self.lr}")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"the seed must be between 0 and 2**31 - 1, got {self.seed}")
        if self.selection not in RULES:
            raise ConfigError(f"unknown selection rule {self.selection!r}; known: {', '.join(RULES)}")
        if self.standardise not in STANDARDISATIONS:
            raise ConfigError(
                f"unknown standardisation {self.standardise!r}; known: {', '.join(STANDARDISATIONS)}"
            )
        self.build_optimiser()

    def build_optimiser(self) -> Optimiser:
        """The optimiser these settings describe.

        Raises:
            ConfigError: an unknown optimiser, or one of its settings is out of range.
        """
        if self.optimiser == "adam":
            return Adam(betas=self.betas, weight_decay=self.weight_decay)
        if self.optimiser == "sgd":
            return Sgd(momentum=self.momentum, weight_decay=self.weight_decay)
        if self.optimiser == "lars":
            return Lars(momentum=self.momentum, weight_decay=self.weight_decay)
        raise ConfigError(f"unknown optimiser {self.optimiser!r}; known: adam, sgd, lars")
