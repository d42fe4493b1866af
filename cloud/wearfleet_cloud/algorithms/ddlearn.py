"""DDLearn: tell seven augmentations apart, keep raw and augmented features apart, pull each activity together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn
from wearfleet_models import ModelSpec, randomness

from wearfleet_cloud.algorithms.base import CORRECTED, MODES, Algorithm, AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.gradients import descend
from wearfleet_cloud.algorithms.losses import accuracy, cross_entropy
from wearfleet_cloud.algorithms.passes import call_part, embed, head
from wearfleet_cloud.data.augment import TRANSFORMS, augment, jitter
from wearfleet_cloud.kernels.contrastive import supervised_contrastive

__all__ = ["DDLearn", "diversity_risk"]

_TRANSFORM = "transform"
_WHICH, _OTHER_PASS, _PROJECTION = range(1_000, 1_003)
_RAW: Final = len(TRANSFORMS)
_NOISE: Final = 0.05
_HIDDEN: Final = 60
_PLAIN: Final = {"cnn": "cnn-plain"}
_WIDTH: Final = {"cnn-plain": 64, "cnn-plain-3": 128}


class _Halves(NamedTuple):
    """Raw windows and augmented ones, N each, and what is to be told about both (2 N)."""

    raw: Tensor
    augmented: Tensor
    y: Tensor
    transform: Tensor
    weights: tuple[Tensor | None, Tensor | None]

    @property
    def weight(self) -> Tensor | None:
        one, two = self.weights
        return None if one is None or two is None else torch.cat((one, two))


@dataclass(frozen=True, slots=True)
class DDLearn(Algorithm):
    """L = CE(h(z), y) + self_weight CE(t(z), transform) + diversity_weight L_div + contrast_weight L_con.

    z are the features of as many raw windows as augmented ones (``data/augment.py``), in two passes with their own
    batch statistics; transform is 0 to 6, or 7 for raw; t is linear. L_div is the risk of a random projection, drawn
    anew at every step and never trained, that calls raw features 1 and augmented ones 0: the features alone make it
    small, which keeps the two apart. L_con is the supervised contrast of all z at temperature 0.07.

    Form "harood": any backbone. Form "original": a plain CNN without normalisation and a dense layer of 64 numbers
    behind it (128 behind "cnn-plain-3", the paper's network for USC-HAD); "cnn" becomes "cnn-plain". The paper's
    scaling of channels to 0 to 1 is part of its data, not of the algorithm: put the minimum and the range of each
    channel into ``model.standardise``.

    Mode "strict": the jitter has a standard deviation of 0.05 in the unit of the channel, the features of the contrast
    are not normalised, and form "harood" draws the jitter only, as its published code does by an index that does not
    reach the other transforms (so that its rotation, which mixes all channels, never happens). "corrected": 0.05
    standard deviations of the channel, normalised features, all seven transforms.

    Source: Qin et al. 2023, arXiv:2306.04641; specs/ood.md 2.3, 3.5, P1, P7, P8, P21.
    Differs: windows are augmented when they are drawn, not once before training, and both halves of a batch are drawn
    from every source domain; the augmented windows are scaled as the raw ones, not by a scaler of their own.
    """

    form: str = "harood"
    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="ddlearn",
        title="DDLearn",
        paper="Qin et al. 2023, arXiv:2306.04641",
        family="augmentation",
        needs=(),
        forward="joint",
        inference="backbone + head; form original: plain CNN + dense layer + head",
        hyper={"self_weight": 1.0, "diversity_weight": 1.0, "contrast_weight": 1.0},
        options={"form": ("harood", "original"), "mode": MODES},
    )

    @classmethod
    def network(cls, spec: ModelSpec, domains: int, options: Mapping[str, str]) -> ModelSpec:
        """As ``Algorithm.network``; the original form has a network of its own."""
        if options.get("form", "harood") == "harood":
            return replace(spec, neck=cls.info.neck)
        backbone = _PLAIN.get(spec.backbone, spec.backbone)
        return replace(
            spec, backbone=backbone, neck="dense", neck_width=_WIDTH.get(backbone, spec.neck_width)
        )

    def modules(self) -> dict[str, nn.Module]:
        """The linear layer that tells the transforms."""
        return {_TRANSFORM: nn.Linear(self.model.head.in_features, len(TRANSFORMS) + 1)}

    def shape(self, batch: int) -> tuple[int, int]:
        """Twice as many windows: the second half is augmented."""
        return self.domains, 2 * batch

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss", "risk", "transform_risk", "diversity", "contrast" and "accuracy"."""
        halves = self._halves(batch, state.buffers["standardise.std"], rng)
        y, weight = halves.y, halves.weight

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            f, after = embed(self.model, params, buffers, halves.raw, halves.weights[0], rng)
            other = randomness.derive(rng, _OTHER_PASS)
            fa, after = embed(self.model, params, after, halves.augmented, halves.weights[1], other)
            both = torch.cat((f, fa))
            told, after = call_part(_TRANSFORM, self.parts[_TRANSFORM], params, after, both)
            logits = head(params, both)
            metrics = {
                "risk": cross_entropy(logits, y, weight),
                "transform_risk": cross_entropy(told, halves.transform, weight),
                "diversity": diversity_risk(f, fa, rng, halves.weights),
                "contrast": self._contrast(both, y, weight),
                "accuracy": accuracy(logits, y, weight),
            }
            loss = metrics["risk"] + hyper["self_weight"] * metrics["transform_risk"]
            loss = loss + hyper["diversity_weight"] * metrics["diversity"]
            return loss + hyper["contrast_weight"] * metrics["contrast"], (metrics, after)

        return descend(objective, state, self.optimiser, hyper["lr"])

    def _contrast(self, features: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        return supervised_contrastive(
            features, y, weight=weight, mode="corrected" if self.mode == CORRECTED else "strict"
        )

    def _halves(self, batch: Batch, std: Tensor, rng: Tensor) -> _Halves:
        half = batch.y.shape[1] // 2
        parts = batch.x[:, :half].flatten(0, 1), batch.x[:, half:].flatten(0, 1)
        labels = torch.cat((batch.y[:, :half].flatten(), batch.y[:, half:].flatten()))
        weights = (
            (None, None)
            if batch.weight is None
            else (batch.weight[:, :half].flatten(), batch.weight[:, half:].flatten())
        )
        corrected = self.mode == CORRECTED
        noise = _NOISE * (std if corrected else torch.ones_like(std))
        count = parts[1].shape[0]
        if corrected or self.form == "original":
            high = torch.full((), len(TRANSFORMS), device=rng.device)
            which = randomness.integers(rng, _WHICH, (count,), high)
            augmented = augment(parts[1], which, rng, noise)
        else:
            which = torch.zeros(count, dtype=torch.int64, device=rng.device)
            augmented = jitter(parts[1], rng, noise)
        transform = torch.cat((torch.full((parts[0].shape[0],), _RAW, device=rng.device), which))
        return _Halves(parts[0], augmented, labels, transform, weights)


def diversity_risk(
    raw: Tensor, augmented: Tensor, rng: Tensor, weights: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Tensor:
    """Mean -log D(raw) plus mean -log(1 - D(augmented)), D a random linear - ReLU - linear - sigmoid of 60 units.

    Args:
        raw: (N, F).
        augmented: (M, F).
        rng: () int64 key; D has the initial weights of torch's linear layers and no slope.
        weights: (N,) and (M,) of each window, None for ones.

    Returns:
        () nats.

    Source: Qin et al. 2023, arXiv:2306.04641; specs/ood.md 2.3 and P8.
    """
    width = raw.shape[1]
    bounds = (1.0 / math.sqrt(width), 1.0 / math.sqrt(_HIDDEN))
    shapes = (
        ((_HIDDEN, width), bounds[0]),
        ((_HIDDEN,), bounds[0]),
        ((_HIDDEN,), bounds[1]),
        ((), bounds[1]),
    )
    first, bias, second, last = (
        bound * (2.0 * randomness.uniform(rng, _PROJECTION + number, shape) - 1.0)
        for number, (shape, bound) in enumerate(shapes)
    )

    def score(features: Tensor) -> Tensor:
        return torch.relu(features @ first.T + bias) @ second + last

    return _mean(F.softplus(-score(raw)), weights[0]) + _mean(F.softplus(score(augmented)), weights[1])


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.mean() if weight is None else (values * weight).sum() / weight.sum().clamp(min=1e-12)
