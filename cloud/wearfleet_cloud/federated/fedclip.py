"""FedCLIP: everything is frozen but an attention over the embedding, which is small, quick to train and averaged.

Source: Lu et al. 2023, arXiv:2302.13485, sections 3.2 and 3.3; specs/federated.md section 7.
Differs: any classifier of ours takes the place of CLIP: its embedding that of the image encoder, the rows of its frozen
head (with their biases) those of the text encoder, not normalised, so that what is trained is what the device uses
(``wearfleet_models.necks.Adapter`` says how the attention is scaled). The contrast is that of the paper: every window
of a batch against the classes of the others. Clients count by their windows unless ``weighting=uniform`` (the paper's).
A batch of one window changes nothing.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole

from wearfleet_cloud.federated.base import ADDITIONS, AveragingStrategy, StrategyInfo

if TYPE_CHECKING:
    from torch import Tensor
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram
    from wearfleet_cloud.federated.client_steps import Tensors

__all__ = ["FedClip"]

_TARGETS: Final = ("identity", "class_soft")
_FAR: Final = -1e9
"""Similarity with a window that is padding."""


@dataclass(frozen=True, slots=True)
class FedClip(AveragingStrategy):
    """An adapter in common on a frozen network.

    Args:
        target: what a window should be like in its batch: ``identity`` (itself only, the paper's) or ``class_soft``
            (all windows of its class alike).

    Raises:
        ConfigError: another target.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="fedclip",
        paper="Lu et al. 2023, arXiv:2302.13485",
        uploaded=(TensorRole.SHARED,),
        composes_with=tuple(a for a in ADDITIONS if a != "record_dp"),
        hyper_parameters={
            "target": "identity (a window is like itself only, the paper's) or class_soft (like all of its class)"
        },
    )
    target: str = "identity"

    def __post_init__(self) -> None:
        if self.target not in _TARGETS:
            raise ConfigError(f"target of FedCLIP must be {' or '.join(_TARGETS)}, got {self.target!r}")

    def network(self, model: "Classifier", seed: int) -> "Classifier":
        """The model with an adapter between backbone and head, both frozen."""
        from wearfleet_models.classifier import derived  # noqa: PLC0415  see AveragingStrategy

        if model.spec.neck not in ("none", "adapter"):
            raise ConfigError(
                f"FedCLIP puts an adapter between backbone and head, but this model has the neck {model.spec.neck}; "
                "train one without a neck"
            )
        return derived(model, seed, neck="adapter", frozen="backbone-and-head")

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local epochs of the adapter on the contrast of each batch.

        Raises:
            ConfigError: the model has no adapter, or is not frozen.
        """
        from wearfleet_cloud.federated.client_program import (  # noqa: PLC0415  see AveragingStrategy
            measured,
            model_specs,
            training_phase,
        )

        if (model.spec.neck, model.spec.frozen) != ("adapter", "backbone-and-head"):
            raise ConfigError(
                "FedCLIP trains an adapter on a frozen model; derive one from a trained model (FedClip.network)"
            )
        train, slots = training_phase(model, self.local, loss=_LOSSES[self.target])
        return measured(model, self.local, (*model_specs(model), *slots), (train,))


def _contrast(logits: "Tensor", given: "Tensors", *, by_class: bool) -> "Tensor":
    """Half the cross-entropy over rows plus half that over columns of similarities s_ij = logit of window i for y_j.

    Args:
        logits: (B, K).
        given: ``y`` (B,), ``weight`` (B,).
        by_class: targets are spread over all windows of a class instead of the window itself.
    """
    import torch  # noqa: PLC0415  see AveragingStrategy

    y, weight = given["y"], given["weight"]
    classes = torch.arange(logits.shape[1], device=logits.device)
    chosen = (y[:, None] == classes).to(logits.dtype)
    similar = logits @ chosen.T
    if by_class:
        likeness = (y[:, None] == y[None, :]).to(logits.dtype)
    else:
        places = torch.arange(y.shape[0], device=logits.device)
        likeness = (places[:, None] == places[None, :]).to(logits.dtype)
    there = (weight > 0).to(logits.dtype)
    likeness = likeness * there[:, None] * there[None, :]
    several = (there.sum() > 1).to(logits.dtype)
    losses = [
        _soft_cross_entropy(matrix + _FAR * (1.0 - there)[None, :], likeness)
        for matrix in (similar, similar.T)
    ]
    return several * 0.5 * (losses[0] + losses[1]) / torch.clamp(there.sum(), min=1.0)


def _soft_cross_entropy(similar: "Tensor", likeness: "Tensor") -> "Tensor":
    """Sum over rows of the cross-entropy with targets in proportion to ``likeness``; a row without any counts 0."""
    import torch  # noqa: PLC0415  see AveragingStrategy

    share = likeness / torch.clamp(likeness.sum(dim=1, keepdim=True), min=1.0)
    return -(share * torch.log_softmax(similar, dim=1)).sum()


def _identity(features: "Tensor", logits: "Tensor", given: "Tensors") -> "Tensor":  # noqa: ARG001 - one of Loss
    return _contrast(logits, given, by_class=False)


def _class_soft(features: "Tensor", logits: "Tensor", given: "Tensors") -> "Tensor":  # noqa: ARG001 - one of Loss
    return _contrast(logits, given, by_class=True)


_LOSSES: Final = {"identity": _identity, "class_soft": _class_soft}
