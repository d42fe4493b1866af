"""How a client trains between two rounds: the options that all strategies share."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.plan import Loop

from wearfleet_cloud.federated.privacy.options import RecordPrivacy

if TYPE_CHECKING:
    from wearfleet_cloud.training.optimisers import Optimiser

__all__ = ["LocalTraining", "option_names", "parse_options"]

_OPTIMISERS: Final = ("adam", "sgd")


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """Local epochs of an optimiser that starts afresh each round.

    Args:
        optimiser: ``sgd`` or ``adam``.
        learning_rate: per step, > 0.
        momentum: of SGD; must be 0 with Adam.
        weight_decay: coupled, added to the gradient.
        batch_size: windows a step.
        epochs: passes over the client's windows a round.
        max_steps: stop a round after so many steps; 0 means no limit.
        record: how steps protect single windows; they then have secret batches, of ``batch_size`` at most, in place
            of epochs.

    Raises:
        ConfigError: an option is out of range.
    """

    optimiser: str = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 32
    epochs: int = 1
    max_steps: int = 0
    record: RecordPrivacy | None = None

    def __post_init__(self) -> None:
        if self.optimiser not in _OPTIMISERS:
            raise ConfigError(f"unknown optimiser {self.optimiser!r}; known: {', '.join(_OPTIMISERS)}")
        if not 0.0 < self.learning_rate < float("inf"):
            raise ConfigError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.optimiser == "adam" and self.momentum:
            raise ConfigError("momentum belongs to sgd; adam has its own (set momentum to 0)")
        if self.batch_size < 1 or self.epochs < 1 or self.max_steps < 0:
            raise ConfigError(
                "batch_size and epochs must be at least 1 and max_steps at least 0, "
                f"got {self.batch_size}, {self.epochs}, {self.max_steps}"
            )
        if not 0.0 <= self.momentum < 1.0 or self.weight_decay < 0.0:
            raise ConfigError(
                "momentum must be at least 0 and below 1 and weight_decay at least 0, "
                f"got {self.momentum}, {self.weight_decay}"
            )

        if self.record is not None and (self.epochs != 1 or self.max_steps):
            raise ConfigError(
                "dp=record has a fixed number of noised steps in place of epochs; set record_steps and leave epochs "
                "and max_steps out"
            )

    def build(self) -> "Optimiser":
        """The optimiser."""
        from wearfleet_cloud.training.optimisers import Adam, Sgd  # noqa: PLC0415  a server that only folds needs no torch

        if self.optimiser == "adam":
            return Adam(weight_decay=self.weight_decay)
        return Sgd(momentum=self.momentum, weight_decay=self.weight_decay)

    def train_loop(self) -> Loop:
        """Shuffled passes over the earlier part of the wearer's recording, or secret batches of it."""
        if self.record is not None:
            steps, rate = self.record.steps, self.record.sampling_rate
            return Loop("train", self.batch_size, 1, steps, shuffle=False, sampling_rate=rate)
        return Loop("train", self.batch_size, self.epochs, self.max_steps, shuffle=True)

    def holdout_loop(self) -> Loop:
        """One pass in order over the later part."""
        return Loop("holdout", self.batch_size, 1, 0, shuffle=False)


def option_names(cls: Any) -> set[str]:
    """Names of the numeric and text fields of dataclass ``cls``: what can be chosen as text."""
    return {f.name for f in fields(cls) if f.type in (int, float, str)}


def parse_options(cls: Any, options: Mapping[str, object]) -> dict[str, Any]:
    """Values for the numeric and text fields of dataclass ``cls``, converted from text where needed.

    Raises:
        ConfigError: an unknown name, or a value that is not of the field's type.
    """
    kinds = {f.name: f.type for f in fields(cls) if f.type in (int, float, str)}
    parsed: dict[str, Any] = {}
    for name, value in options.items():
        if name not in kinds:
            raise ConfigError(f"unknown option {name!r}; known: {', '.join(sorted(kinds))}")
        try:
            parsed[name] = kinds[name](str(value))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"option {name} must be of type {kinds[name].__name__}, got {value!r}"
            ) from error
    return parsed
