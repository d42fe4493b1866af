"""SDMix: mix windows of two domains and weigh their labels by how much room each class takes in its domain."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.func import vmap
from wearfleet_models import randomness

from wearfleet_cloud.algorithms.base import (
    CORRECTED,
    MODES,
    Algorithm,
    AlgorithmInfo,
    Batch,
    State,
    Tensors,
    TrainingWindows,
)
from wearfleet_cloud.algorithms.full_pass import over_all_windows
from wearfleet_cloud.algorithms.gradients import descend
from wearfleet_cloud.algorithms.losses import accuracy
from wearfleet_cloud.algorithms.margin_risk import mixed_margin_risks
from wearfleet_cloud.algorithms.mixup import Mixed, mix
from wearfleet_cloud.algorithms.passes import embed, features_of_domains

__all__ = ["SDMix", "class_radii", "semantic_shares"]

_CIRCLE, _SHARE, _ORDER = 1_000, 1_001, 1_000_000
_RADIUS = "radius"
_STRICT_BATCH: Final = 64
"""Windows of a batch of the published code's pass over the training set."""


@dataclass(frozen=True, slots=True)
class SDMix(Algorithm):
    """L = mean over pairs of domains (a, b) of mean_i [w_i LM(z_i, y_a,i) + (1 - w_i) LM(z_i, y_b,i)].

    x = lam x_a + (1 - lam) x_b, row with row; lam ~ Beta(mixup_alpha, mixup_alpha) for every pair of a random circle
    of domains; z its embedding behind the bottleneck, normalised by the pair's statistics; w = lam r_a / (lam r_a +
    (1 - lam) r_b), where r is the radius of a window's class in its domain; LM as in FIXED.

    Radii come from a pass over all training windows before every ``radius_passes``-th pass of training: largest or
    mean ``distance`` of the embeddings of a class from their mean, within a domain.

    Source: Lu et al. 2022, arXiv:2206.06629; specs/ood.md 3.3.
    Differs: two radii of 0 give w = lam (published: 0/0). "corrected" takes the mean over all windows of a class for
    radius "mean" and bounds the slope of the margin; "strict" takes the largest of the means within batches of 64 (of a
    random order) and does not bound it. The radius of whole domains, computed but not used, is left out.
    """

    radius: str = "largest"
    distance: str = "euclidean"
    top_k: str = "5"
    radius_passes: str = "1"
    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="sdmix",
        title="SDMix",
        paper="Lu et al. 2022, arXiv:2206.06629",
        family="augmentation",
        needs=("domain labels", "full pass"),
        forward="per-domain",
        inference="backbone + bottleneck + head",
        hyper={"mixup_alpha": 0.2, "gamma": 100.0},
        options={
            "radius": ("largest", "mean"),
            "distance": ("euclidean", "manhattan", "cosine"),
            "top_k": ("5", "1", "2"),
            "radius_passes": ("1", "2", "5", "10"),
            "mode": MODES,
        },
        neck="bottleneck",
    )

    def init(self, seed: int = 0) -> State:
        """As ``Algorithm.init``, with room for the radii (D, K)."""
        state = Algorithm.init(self, seed)
        like = state.params["head.bias"]
        return state._replace(extras={_RADIUS: like.new_zeros(self.domains, len(like))})

    def refresh_at(self, number: int, pass_steps: int) -> bool:
        """Before the first step of every ``radius_passes``-th pass."""
        return number % (pass_steps * int(self.radius_passes)) == 0

    def refresh(self, state: State, data: TrainingWindows, hyper: Mapping[str, Tensor], rng: Tensor) -> State:
        """As ``Algorithm.refresh``: the radii anew."""

        def forward(x: Tensor) -> Tensor:
            return embed(self.model, state.params, state.buffers, x, None, None)[0]

        z = over_all_windows(data, forward, self.model)
        domains, classes = state.extras[_RADIUS].shape
        batches = None
        if self.mode != CORRECTED and self.radius == "mean":
            batches = _positions(data, rng) // _STRICT_BATCH
        groups = data.domain * classes + data.y
        radii = class_radii(
            z, groups, domains * classes, distance=self.distance, radius=self.radius, batches=batches
        )
        return state._replace(extras={_RADIUS: radii.reshape(domains, classes)})

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss" and "accuracy" (both labels by their share)."""
        domains = batch.y.shape[0]
        circle = randomness.permutation(rng, _CIRCLE, domains)
        keys = randomness.derive(rng, torch.arange(domains, device=rng.device))
        lam = vmap(lambda key: randomness.beta(key, _SHARE, hyper["mixup_alpha"]))(keys)
        mixed = mix(_turned(batch, circle), _turned(batch, circle.roll(-1)), lam)
        radii = state.extras[_RADIUS][circle]
        first = semantic_shares(lam, radii.gather(1, mixed.y), radii.roll(-1, 0).gather(1, mixed.other))
        shares = torch.stack((first, 1.0 - first), dim=2)
        labels = torch.stack((mixed.y, mixed.other), dim=2)
        pairs = Batch(mixed.x, mixed.y, mixed.weight)

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            _, logits, after = features_of_domains(self.model, params, buffers, pairs, rng)
            risks = mixed_margin_risks(
                logits,
                params["head.weight"],
                labels,
                shares,
                hyper["gamma"],
                top_k=int(self.top_k),
                mode=self.mode,
                weight=mixed.weight,
            )
            return risks.mean(), ({"accuracy": _accuracy(logits, mixed)}, after)

        return descend(objective, state, self.optimiser, hyper["lr"])


def class_radii(
    z: Tensor, groups: Tensor, count: int, *, distance: str, radius: str, batches: Tensor | None = None
) -> Tensor:
    """How far the members of every group lie from their mean.

    Args:
        z: (N, F).
        groups: (N,) int64 below ``count``: domain and class in one number.
        count: G, number of groups.
        distance: "euclidean", "manhattan" or "cosine" (1 - cosine).
        radius: "largest" or "mean" distance of a group.
        batches: (N,) int64 for the largest of the means within batches, None for one batch.

    Returns:
        (G,), 0 for a group without members.
    """
    centre = _means(z, groups, count)
    far = _distances(z, centre[groups], distance)
    if radius == "largest":
        return far.new_zeros(count).scatter_reduce(0, groups, far, "amax")
    if batches is None:
        return _means(far[:, None], groups, count)[:, 0]
    parts = -(-len(z) // _STRICT_BATCH)
    of_batches = _means(far[:, None], groups * parts + batches, count * parts)[:, 0]
    return of_batches.reshape(count, parts).amax(dim=1)


def semantic_shares(lam: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Share of the first label of every mixed window: lam r_a / (lam r_a + (1 - lam) r_b), or lam where that is 0/0.

    Args:
        lam: (D,) share of the first window.
        first: (D, B) radius of its class in its domain.
        second: (D, B) radius of the second window's.

    Returns:
        (D, B).
    """
    one, two = lam[:, None] * first, (1.0 - lam[:, None]) * second
    total = one + two
    return torch.where(total > 0, one / torch.where(total > 0, total, 1.0), lam[:, None])


def _means(rows: Tensor, groups: Tensor, count: int) -> Tensor:
    """(count, F) mean of the rows (N, F) of every group, 0 without members."""
    sums = rows.new_zeros(count, rows.shape[1]).index_add(0, groups, rows)
    members = rows.new_zeros(count).index_add(0, groups, torch.ones_like(rows[:, 0]))
    return sums / members.clamp(min=1.0)[:, None]


def _distances(z: Tensor, centre: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        return 1.0 - torch.cosine_similarity(z, centre, dim=1)
    far: Tensor = torch.linalg.vector_norm(z - centre, ord=2 if distance == "euclidean" else 1, dim=1)
    return far


def _positions(data: TrainingWindows, rng: Tensor) -> Tensor:
    """(N,) int64 place of every window in a random order of the windows of its domain."""
    drawn = randomness.uniform(rng, _ORDER, (data.y.shape[0],))
    ranks = torch.argsort(torch.argsort(drawn.double() + data.domain))  # domain after domain
    return ranks - (data.count.cumsum(0) - data.count)[data.domain]


def _accuracy(logits: Tensor, mixed: Mixed) -> Tensor:
    """Of both labels, by the share of their window: ()."""
    lam = mixed.lam[:, None].expand(mixed.y.shape)
    share = torch.stack((lam, 1.0 - lam)) * (1.0 if mixed.weight is None else mixed.weight)
    return accuracy(logits.expand(2, *logits.shape), torch.stack((mixed.y, mixed.other)), share)


def _turned(batch: Batch, order: Tensor) -> Batch:
    weight = None if batch.weight is None else batch.weight[order]
    return Batch(batch.x[order], batch.y[order], weight)
