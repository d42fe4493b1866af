"""The whole model: raw window in, logits out."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final, Protocol, cast

import torch
from torch import Tensor, nn
from wearfleet_protos.errors import ConfigError

from wearfleet_models.backbones import (
    Cnn,
    DeepConvLstm,
    MultimodalTransformer,
    PatchTransformer,
    ResNet,
    Transformer,
    lag_cnn,
    lag_transformer,
)
from wearfleet_models.layers import Standardise
from wearfleet_models.necks import NECKS, Neck
from wearfleet_models.surgery import InputSurgery

__all__ = ["BACKBONES", "FROZEN", "Classifier", "ModelSpec", "build_classifier", "derived"]

FROZEN: Final[Mapping[str, tuple[str, ...]]] = {
    "none": (),
    "backbone": ("backbone",),
    "backbone-and-head": ("backbone", "head"),
}
"""What federated training leaves as it is -> the parts of a classifier."""

_MULTIMODAL: Final = "multimodal-transformer"
_LOW_RANK: Final = ("transformer", _MULTIMODAL)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything needed to build the same network again.

    Args:
        backbone: a key of :data:`BACKBONES`.
        channels: C of a window.
        window: T of a window, samples.
        classes: K.
        kernel: length of the convolutions (the CNNs) or of a patch (patch-transformer), samples.
        dropout: share of dropped activations (the Transformers, deep-conv-lstm).
        feedforward: width of the feed-forward blocks (all Transformers but patch-transformer).
        neck: what stands between backbone and head, a key of :data:`wearfleet_models.NECKS`.
        neck_width: numbers in the embedding (bottleneck, dense, mixture).
        domains: number of source domains, at least 1 (mixture).
        frozen: what federated training leaves as it is, a key of :data:`FROZEN`.
        lora_rank: of low-rank additions to queries and values (transformer, multimodal-transformer), which no frozen
            part holds; 0 for none.
        surgery: h of an ``InputSurgery`` before the backbone, with a linear layer behind the head; 0 for neither.
        code_width: k of the surgery.
        modalities: the kind of sensor of each channel, 0 to G - 1, each of them at least once (multimodal-transformer);
            empty for one kind.

    Raises:
        ConfigError: an unknown backbone, neck or frozen part, a size below one, a mixture over no domains, or kinds of
            sensors that do not fit the channels or the backbone.
    """

    backbone: str
    channels: int
    window: int
    classes: int
    kernel: int = 9
    dropout: float = 0.2
    feedforward: int = 2048
    neck: str = "none"
    neck_width: int = 256
    domains: int = 0
    frozen: str = "none"
    lora_rank: int = 0
    surgery: int = 0
    code_width: int = 0
    modalities: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("backbone", self.backbone, BACKBONES),
            ("neck", self.neck, NECKS),
            ("frozen part", self.frozen, FROZEN),
        ):
            if name not in known:
                raise ConfigError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
        lowest = dict.fromkeys(("channels", "window", "classes", "kernel", "feedforward", "neck_width"), 1)
        lowest |= {"domains": 1 if self.neck == "mixture" else 0, "surgery": 0, "code_width": 0}
        lowest["lora_rank"] = 0
        if self.lora_rank and self.backbone not in _LOW_RANK:
            raise ConfigError(
                f"low-rank additions belong to the transformer and to {_MULTIMODAL}, not to {self.backbone}"
            )
        for field, least in lowest.items():
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"{field} of the model must be a whole number of at least {least}, got {value!r}"
                )
        object.__setattr__(self, "modalities", tuple(self.modalities))  # a list where it comes from JSON
        self._check_modalities()

    def _check_modalities(self) -> None:
        kinds = self.modalities
        if kinds and self.backbone != _MULTIMODAL:
            raise ConfigError(f"modalities belong to {_MULTIMODAL}, not to {self.backbone}; leave them out")
        if kinds and (len(kinds) != self.channels or set(kinds) != set(range(len(set(kinds))))):
            raise ConfigError(
                f"modalities must give each of {self.channels} channels a number 0, 1, ... without gaps, got {kinds}"
            )

    def to_dict(self) -> dict[str, object]:
        """The fields, for JSON; ``ModelSpec(**d)`` is the inverse."""
        return asdict(self)


class Backbone(Protocol):
    """From a standardised window to features."""

    num_features: int

    def __call__(self, x: Tensor, weight: Tensor | None, rng: Tensor | None) -> Tensor:
        """(B, C, T), (B,), () -> (B, num_features)."""


class Classifier(nn.Module):
    """Standardise, backbone, neck, linear head.

    ``standardise`` holds the statistics of the training data, so a window enters in raw units. Without a neck the
    tensors are those of backbone and head only, and their names say nothing of a neck.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.standardise = Standardise(spec.channels)
        self.backbone = cast("Backbone", BACKBONES[spec.backbone](spec))
        neck = NECKS[spec.neck](self.backbone.num_features, spec.neck_width, spec.domains)
        self.neck = cast("Neck", neck)
        self.head = nn.Linear(self.neck.num_features, spec.classes)
        if spec.surgery:
            size = spec.channels, spec.window, spec.surgery, spec.code_width
            self.surgery: nn.Module = InputSurgery(*size)
            self.remap: nn.Module = _linear_identity(spec.classes)
        else:
            self.surgery = self.remap = nn.Identity()

    def features(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:
        """The embedding of raw windows: what the head takes.

        Args:
            x: (B, C, T) raw units.
            weight: (B,) weight of each window in batch statistics, None for ones.
            rng: () int64 key of the dropout masks, None for no dropout.

        Returns:
            (B, F).
        """
        window = self.surgery(self.standardise(x))
        embedding: Tensor = self.neck(self.backbone(window, weight, rng), weight)
        return embedding

    def classify(self, embedding: Tensor) -> Tensor:
        """Logits (B, K) of embeddings (B, F)."""
        logits: Tensor = self.remap(self.head(embedding))
        return logits

    def forward(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:
        """Logits (B, K) of raw windows; arguments as in ``features``."""
        return self.classify(self.features(x, weight, rng))


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


def derived(model: Classifier, seed: int = 0, **changes: object) -> Classifier:
    """A model of a changed specification with the weights of another wherever name and shape agree.

    Args:
        model: left as it is.
        seed: of the weights that it does not have.
        changes: fields of :class:`ModelSpec`, for example ``neck="adapter"``.

    Raises:
        ConfigError: a change that makes no model.
    """
    made = build_classifier(replace(model.spec, **changes), seed)  # type: ignore[arg-type]
    own, given = made.state_dict(), model.state_dict()
    made.load_state_dict(
        {
            name: given[name] if name in given and given[name].shape == tensor.shape else tensor
            for name, tensor in own.items()
        }
    )
    return made.train(model.training)


def _linear_identity(classes: int) -> nn.Linear:
    """A layer that at first changes nothing."""
    layer = nn.Linear(classes, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(classes))
        layer.bias.zero_()
    return layer


def _cnn(*filters: int, normalise: bool = True) -> Callable[[ModelSpec], nn.Module]:
    return lambda spec: Cnn(spec.channels, spec.window, spec.kernel, filters, normalise=normalise)


def _transformer(*, strict: bool) -> Callable[[ModelSpec], nn.Module]:
    return lambda spec: Transformer(
        spec.channels,
        spec.window,
        dropout=spec.dropout,
        feedforward=spec.feedforward,
        strict=strict,
        rank=spec.lora_rank,
    )


def _multimodal(spec: ModelSpec) -> nn.Module:
    return MultimodalTransformer(
        spec.modalities or (0,) * spec.channels,
        spec.window,
        dropout=spec.dropout,
        feedforward=spec.feedforward,
        rank=spec.lora_rank,
    )


BACKBONES: Final[Mapping[str, Callable[[ModelSpec], nn.Module]]] = {
    "cnn": _cnn(16, 32),
    "cnn-small": _cnn(16),
    "cnn-large": _cnn(16, 32, 32, 32),
    "cnn-plain": _cnn(16, 32, normalise=False),
    "cnn-plain-3": _cnn(16, 32, 64, normalise=False),
    "lag-cnn": lambda spec: lag_cnn(spec.channels, spec.window, spec.kernel),
    "transformer": _transformer(strict=False),
    "transformer-strict": _transformer(strict=True),
    "lag-transformer": lambda spec: lag_transformer(
        spec.channels, spec.window, spec.dropout, spec.feedforward
    ),
    _MULTIMODAL: _multimodal,
    "patch-transformer": lambda spec: PatchTransformer(spec.channels, spec.window, spec.kernel, spec.dropout),
    "deep-conv-lstm": lambda spec: DeepConvLstm(spec.channels, spec.window, spec.dropout),
    "resnet": lambda spec: ResNet(spec.channels),
}
"""Name -> backbone of a specification; ``transformer-strict`` has the benchmark's faults, for comparison only."""
