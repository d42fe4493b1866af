"""URM: features that a critic cannot tell from uniform noise, so that none of their range is given to one domain."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn
from wearfleet_models import ModelSpec, randomness

from wearfleet_cloud.algorithms.base import (
    CORRECTED,
    MODES,
    Algorithm,
    AlgorithmInfo,
    Batch,
    State,
    Tensors,
)
from wearfleet_cloud.algorithms.gradients import descend
from wearfleet_cloud.algorithms.losses import accuracy, cross_entropy
from wearfleet_cloud.algorithms.passes import call_part, embed, head, pooled

__all__ = ["Urm", "noise"]

_PART = "critic"
_SLOTS = "critic:"
"""Prefix of the slots of the critic's optimiser."""
_NOISE, _REAL, _FAKE = 1_000, 1_001, 1_002


@dataclass(frozen=True, slots=True)
class Urm(Algorithm):
    """Two optimiser steps: of the network on CE(h(z), y) + gamma BCE(Q(z), 1), then of the critic Q.

    z = o(F(x)) with the bounded activation o of the option ``output``. The critic descends BCE(Q(n), t1) +
    gamma BCE(Q(z), t0) with noise n, uniform over the range of o, and the z of the first step. Targets are 1 and 0, or
    with ``smoothing`` s random in [1 - s, 1] and [0, s].

    Source: Krishnamachari et al. 2024, "Uniformly Distributed Feature Representations for Fair and Robust Learning",
    TMLR; specs/ood.md 2.15.
    Differs: mode "strict" leaves the activation out on Transformers, where the published code forgets it, so that
    unbounded features are compared with bounded noise.

    The convolutional backbones end in a ReLU, so that behind "tanh" and "sigmoid" half of the noise lies where no
    feature can be, and the critic always wins; behind "relu" they can meet.
    """

    output: str = "tanh"
    depth: str = "2"
    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="urm",
        title="URM",
        paper="Krishnamachari et al. 2024, TMLR",
        family="adversarial",
        needs=(),
        forward="joint",
        inference="backbone + activation + head",
        hyper={"gamma": 0.1, "smoothing": 0.0},
        options={"output": ("tanh", "relu", "sigmoid"), "depth": ("2", "1", "3"), "mode": MODES},
        neck="tanh",
    )

    @classmethod
    def network(cls, spec: ModelSpec, domains: int, options: Mapping[str, str]) -> ModelSpec:
        """As ``Algorithm.network``: with the activation between backbone and head."""
        forgotten = options.get("mode") == "strict" and "transformer" in spec.backbone
        return replace(spec, neck="none" if forgotten else options.get("output", cls.info.neck))

    def modules(self) -> dict[str, nn.Module]:
        """As ``Algorithm.modules``: the critic, from features to one logit."""
        layers: list[nn.Module] = [nn.Linear(self.model.head.in_features, 100), nn.LeakyReLU(0.01)]
        for _ in range(int(self.depth)):
            layers += [nn.Linear(100, 100), nn.LeakyReLU(0.01)]
        return {_PART: nn.Sequential(*layers, nn.Linear(100, 1))}

    def init(self, seed: int = 0) -> State:
        """As ``Algorithm.init``, with slots for two optimisers."""
        state = Algorithm.init(self, seed)
        slots: Tensors = {}
        for prefix, critic in (("", False), (_SLOTS, True)):
            own = {name: state.params[name] for name in _names(state.params, critic=critic)}
            slots |= {f"{prefix}{name}": slot for name, slot in self.optimiser.init(own).items()}
        return state._replace(slots=slots)

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss", "critic" (the critic's loss) and "accuracy"."""
        x, y, weight = pooled(batch)

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            features, after = embed(self.model, params, buffers, x, weight, rng)
            logits = head(params, features)
            told, after = self._told(params, after, features, torch.ones_like(features[:, 0]), weight)
            loss = cross_entropy(logits, y, weight) + hyper["gamma"] * told
            return loss, ({"accuracy": accuracy(logits, y, weight), "features": features}, after)

        network = _names(state.params, critic=False)
        state, metrics = descend(objective, state, self.optimiser, hyper["lr"], trained=network)
        features = metrics.pop("features").detach()

        def critic(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            real, fake = _targets(hyper["smoothing"], rng, features)
            loss, buffers = self._told(params, buffers, noise(self.output, rng, features), real, weight)
            against, buffers = self._told(params, buffers, features, fake, weight)
            return loss + hyper["gamma"] * against, ({}, buffers)

        names = _names(state.params, critic=True)
        state, told = descend(critic, state, self.optimiser, hyper["lr"], trained=names, slots=_SLOTS)
        return state, {**metrics, "critic": told["loss"]}

    def _told(
        self, params: Tensors, buffers: Tensors, features: Tensor, target: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensors]:
        """Binary cross-entropy of the critic's logits against targets (B,), and the buffers after the pass."""
        logits, after = call_part(_PART, self.parts[_PART], params, buffers, features)
        losses = F.softplus(logits[:, 0]) - target * logits[:, 0]
        if weight is None:
            return losses.mean(), after
        return (losses * weight).sum() / weight.sum().clamp(min=1e-12), after


def noise(output: str, rng: Tensor, like: Tensor) -> Tensor:
    """Uniform noise over the range of an activation: [-1, 1) for "tanh", [0, 1) for "relu" and "sigmoid".

    Args:
        output: the activation.
        rng: () int64 key.
        like: (B, F) features.
    """
    drawn = randomness.uniform(rng, _NOISE, tuple(like.shape)).to(like.dtype)
    return 2.0 * drawn - 1.0 if output == "tanh" else drawn


def _targets(smoothing: Tensor, rng: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) targets of noise, from 1 - smoothing to 1, and of features, from 0 to smoothing."""
    count = (features.shape[0],)
    high, low = (randomness.uniform(rng, salt, count).to(features.dtype) for salt in (_REAL, _FAKE))
    return 1.0 - smoothing * high, smoothing * low


def _names(params: Tensors, *, critic: bool) -> list[str]:
    return [name for name in params if name.startswith(f"{_PART}/") is critic]
