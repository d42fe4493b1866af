"""DIVERSIFY: find the latent domains in which the windows differ most, then hide them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from wearfleet_models.necks import Bottleneck
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.algorithms.base import (
    CORRECTED,
    MODES,
    Algorithm,
    AlgorithmInfo,
    Batch,
    State,
    Step,
    Tensors,
    TrainingWindows,
)
from wearfleet_cloud.algorithms.discriminator import Discriminator, adversarial_risk
from wearfleet_cloud.algorithms.full_pass import over_all_windows
from wearfleet_cloud.algorithms.gradients import Objective, descend
from wearfleet_cloud.algorithms.losses import accuracy, cross_entropy
from wearfleet_cloud.algorithms.passes import call_part, embed, features_before_neck, head, pooled

__all__ = ["Diversify", "relabelled"]

_LABEL = "latent_domain"
_FINE: Final = ("backbone.", "fine_neck/", "fine_head/")
_LATENT: Final = ("latent_neck/", "latent_head/", "latent_classes/")
_INVARIANT: Final = ("neck.", "head.", "domains/")
_STAGES: Final = {"fine:": _FINE, "latent:": _LATENT, "invariant:": _INVARIANT}
"""Prefix of an optimiser's slots -> prefixes of the parameters that it moves."""
_FEW: Final = 6
"""From so many latent domains on, each counts for half as many windows of a batch."""


@dataclass(frozen=True, slots=True)
class Diversify(Algorithm):
    """Rounds of three stages of ``local_passes`` passes over all windows; d is the latent domain of a window, first 0.

    1. L = CE(h_a(b_a(F(x))), d K + y); moves F, b_a, h_a, and nothing else ever moves F.
    2. L = CE(D_d(GRL(u)), y) + CE(h_d(u), d) + entropy H(softmax(h_d(u))), u = b_d(F(x)); moves b_d, h_d, D_d. Then the
       windows are assigned to latent domains anew (:func:`relabelled`).
    3. L = CE(h(z), y) + CE(D(GRL(z)), d), z = b(F(x)), ``step``; moves b, h, D. h(b(F(x))) predicts.

    Each stage has an optimiser of its own. The reversals are multiplied by ``class_reversal`` in stage 2 and by
    ``reversal`` in stage 3; b are bottlenecks, h linear layers, D discriminators; there are K classes. A batch has
    ``batch`` windows for every one of the ``latent_domains``, half of that from 6 on.

    Stages 1 and 2 report "fine_accuracy" and "latent_accuracy" beside "loss", not "accuracy".

    Source: Lu et al. 2023, arXiv:2209.07027; specs/ood.md 3.4.
    Differs: "corrected" leaves a latent domain without windows empty; in "strict" its centre, which is 0, attracts all
    windows, as the undefined cosine distance does in the published code. The last, incomplete batch of a pass is
    dropped in both.
    """

    latent_domains: str = "10"
    local_passes: str = "3"
    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="diversify",
        title="DIVERSIFY",
        paper="Lu et al. 2023, arXiv:2209.07027",
        family="latent domains",
        needs=("full pass",),
        forward="joint",
        inference="backbone + bottleneck + head",
        hyper={"class_reversal": 1.0, "reversal": 1.0, "entropy": 0.0},
        options={
            "latent_domains": ("10", "2", "3", "5", "20"),
            "local_passes": ("3", "1", "5", "10", "30"),
            "mode": MODES,
        },
        neck="bottleneck",
        sampling="pooled",
    )

    def modules(self) -> dict[str, nn.Module]:
        """b_a, h_a; b_d, h_d, D_d; D."""
        inputs, width, classes = (
            self.model.backbone.num_features,
            self.model.neck.num_features,
            self.model.spec.classes,
        )
        latent = int(self.latent_domains)
        return {
            "fine_neck": Bottleneck(inputs, width),
            "fine_head": nn.Linear(width, classes * latent),
            "latent_neck": Bottleneck(inputs, width),
            "latent_head": nn.Linear(width, latent),
            "latent_classes": Discriminator(width, classes),
            "domains": Discriminator(width, latent),
        }

    def init(self, seed: int = 0) -> State:
        """As ``Algorithm.init``, with the slots of three optimisers."""
        state = Algorithm.init(self, seed)
        slots = {
            prefix + name: slot
            for prefix, parts in _STAGES.items()
            for name, slot in self.optimiser.init(_of(state.params, parts)).items()
        }
        return state._replace(slots=slots)

    def shape(self, batch: int) -> tuple[int, int]:
        """One pooled batch of ``batch`` or ``batch / 2`` windows for every latent domain."""
        latent = int(self.latent_domains)
        return 1, latent * (batch if latent < _FEW else max(batch // 2, 1))

    def step_at(self, number: int, pass_steps: int) -> Step:
        """The stage that is on."""
        stage = number // (int(self.local_passes) * pass_steps) % len(_STAGES)
        return (self.fine_step, self.latent_step, self.step)[stage]

    def refresh_at(self, number: int, pass_steps: int) -> bool:
        """At the start, and between the second and the third stage of every round."""
        stage = int(self.local_passes) * pass_steps
        return number == 0 or number % (len(_STAGES) * stage) == 2 * stage

    def refresh(self, state: State, data: TrainingWindows, hyper: Mapping[str, Tensor], rng: Tensor) -> State:
        """As ``Algorithm.refresh``: all windows in latent domain 0 at first, then assigned anew."""
        if _LABEL not in state.extras:
            return state._replace(extras={_LABEL: torch.zeros_like(data.y)})
        neck, last = self.parts["latent_neck"], self.parts["latent_head"]

        def forward(x: Tensor) -> Tensor:
            f, _ = features_before_neck(self.model, state.params, state.buffers, x, None, None)
            u, _ = call_part("latent_neck", neck, state.params, state.buffers, f)
            logits, _ = call_part("latent_head", last, state.params, state.buffers, u)
            return torch.cat((u, logits), dim=1)

        both = over_all_windows(data, forward, self.model, neck)
        latent = int(self.latent_domains)
        u, logits = both[:, :-latent], both[:, -latent:]
        return state._replace(extras={_LABEL: relabelled(u, logits, mode=self.mode)})

    def fine_step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """Stage 1; metrics "loss" and "fine_accuracy"."""
        x, y, weight = pooled(batch)
        fine = _latent(state, batch) * self.model.spec.classes + y

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            f, after = features_before_neck(self.model, params, buffers, x, weight, rng)
            embedding, after = call_part("fine_neck", self.parts["fine_neck"], params, after, f, weight)
            logits, after = call_part("fine_head", self.parts["fine_head"], params, after, embedding)
            return cross_entropy(logits, fine, weight), (
                {"fine_accuracy": accuracy(logits, fine, weight)},
                after,
            )

        return self._stage("fine:", objective, state, hyper)

    def latent_step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """Stage 2; metrics "loss", "latent_class_risk" and "latent_accuracy"."""
        x, y, weight = pooled(batch)
        latent = _latent(state, batch)

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            f, after = features_before_neck(self.model, params, buffers, x, weight, rng)
            u, after = call_part("latent_neck", self.parts["latent_neck"], params, after, f, weight)
            told, after = adversarial_risk(
                "latent_classes", self.parts, params, after, u, y, hyper["class_reversal"], weight
            )
            logits, after = call_part("latent_head", self.parts["latent_head"], params, after, u)
            loss = told + cross_entropy(logits, latent, weight) + hyper["entropy"] * _entropy(logits, weight)
            metrics = {
                "latent_class_risk": told,
                "latent_accuracy": accuracy(logits, latent, weight),
            }
            return loss, (metrics, after)

        return self._stage("latent:", objective, state, hyper)

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """Stage 3; metrics "loss", "risk", "domain_risk" and "accuracy"."""
        x, y, weight = pooled(batch)
        latent = _latent(state, batch)

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            z, after = embed(self.model, params, buffers, x, weight, rng)
            told, after = adversarial_risk(
                "domains", self.parts, params, after, z, latent, hyper["reversal"], weight
            )
            logits = head(params, z)
            risk = cross_entropy(logits, y, weight)
            metrics = {"risk": risk, "domain_risk": told, "accuracy": accuracy(logits, y, weight)}
            return risk + told, (metrics, after)

        return self._stage("invariant:", objective, state, hyper)

    def _stage(
        self, slots: str, objective: Objective, state: State, hyper: Mapping[str, Tensor]
    ) -> tuple[State, dict[str, Tensor]]:
        trained = tuple(_of(state.params, _STAGES[slots]))
        return descend(objective, state, self.optimiser, hyper["lr"], trained=trained, slots=slots)


def relabelled(u: Tensor, logits: Tensor, *, mode: str) -> Tensor:
    """The latent domain of every window: nearest centre by cosine, after one refinement of the centres.

    The first centres are means weighed by softmax(logits), the second those of the windows nearest to the first; a
    constant 1 is appended to every embedding and the row brought to unit length.

    Args:
        u: (N, W) embeddings.
        logits: (N, D) of the latent domains.
        mode: a latent domain that is nearest to no window stays empty in "corrected" and takes all in "strict".

    Returns:
        (N,) int64.

    Source: Lu et al. 2023, arXiv:2209.07027; specs/ood.md 3.4, stage 3, and P4.
    """
    rows = nn.functional.normalize(torch.cat((u, torch.ones_like(u[:, :1])), dim=1), dim=1)
    first = _nearest(rows, torch.softmax(logits, dim=1), mode)
    members = (first[:, None] == torch.arange(logits.shape[1], device=rows.device)).to(rows.dtype)
    return _nearest(rows, members, mode)


def _nearest(rows: Tensor, share: Tensor, mode: str) -> Tensor:
    """(N,) int64 number of the centre with the largest cosine; share (N, D) of every row in every centre."""
    total = share.sum(dim=0)
    centres = (share.T @ rows) / (1e-8 + total)[:, None]
    cosine = rows @ nn.functional.normalize(centres, dim=1).T
    return torch.where(total > 0, cosine, -2.0 if mode == CORRECTED else 2.0).argmax(dim=1)


def _entropy(logits: Tensor, weight: Tensor | None) -> Tensor:
    """Mean entropy, with the published code's 1e-5 inside the logarithm: (), nats."""
    p = torch.softmax(logits, dim=1)
    entropies = -(p * torch.log(p + 1e-5)).sum(dim=1)
    return entropies.mean() if weight is None else (entropies * weight).sum() / weight.sum().clamp(min=1e-12)


def _latent(state: State, batch: Batch) -> Tensor:
    """(N,) int64 latent domain of the windows of a pooled batch."""
    if batch.number is None:
        raise ConfigError("diversify keeps a label for every training window: batches need Batch.number")
    return state.extras[_LABEL][batch.number.flatten()]


def _of(params: Tensors, prefixes: tuple[str, ...]) -> Tensors:
    return {name: p for name, p in params.items() if name.startswith(prefixes)}
