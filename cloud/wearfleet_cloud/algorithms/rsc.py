"""RSC: hide the features that the right class leans on most, so that the others learn to do without them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wearfleet_cloud.algorithms.base import Algorithm, AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.gradients import descend
from wearfleet_cloud.algorithms.losses import accuracy, cross_entropy
from wearfleet_cloud.algorithms.passes import embed, head, pooled

__all__ = ["Rsc", "quantile"]


@dataclass(frozen=True, slots=True)
class Rsc(Algorithm):
    """L = CE(h(m z), y), z = F(x): features m = 0 are hidden, in windows that suffer from it.

    With g_i = d l_i[y_i] / d z = W[y_i], the row of the linear head, feature f of window i may be hidden when
    g_if is not below the (1 - ``features``) quantile of its row. Hiding lowers the probability of the right class by
    c_i; windows whose c_i is below the (1 - ``windows``) quantile of the batch are left intact. Masks are constants.

    Source: Huang et al. 2020, arXiv:2007.02454, equations 1 to 4; specs/ood.md 2.10.
    Differs: as in HAROOD and DomainBed the largest gradients are hidden feature by feature, always, and the quantile's
    own feature is among them; one quantile a class is computed, not one a window; windows of weight 0 do not count.
    """

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="rsc",
        title="RSC",
        paper="Huang et al. 2020, arXiv:2007.02454",
        family="regularisation",
        needs=(),
        forward="joint",
        inference="backbone + head",
        hyper={"features": 1.0 / 3.0, "windows": 1.0 / 3.0},
        options={},
    )

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss", "accuracy" (nothing hidden) and "hidden", the share of features."""
        x, y, weight = pooled(batch)

        def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            features, after = embed(self.model, params, buffers, x, weight, rng)
            fixed = {name: params[name].detach() for name in ("head.weight", "head.bias")}
            mask = _kept(fixed, features.detach(), y, weight, hyper)
            counted = torch.ones_like(mask[:, 0]) if weight is None else (weight > 0.0).to(mask.dtype)
            hidden = ((1.0 - mask.mean(dim=1)) * counted).sum() / counted.sum().clamp(min=1.0)
            metrics = {"accuracy": accuracy(head(fixed, features), y, weight), "hidden": hidden}
            return cross_entropy(head(params, features * mask), y, weight), (metrics, after)

        return descend(objective, state, self.optimiser, hyper["lr"])


def quantile(values: Tensor, share: Tensor, weight: Tensor | None = None) -> Tensor:
    """The number below which a share of the values lies, interpolated linearly between neighbours.

    Args:
        values: (..., N).
        share: () between 0 and 1.
        weight: (N,) values of weight 0 do not count (those above 0 count once); None for all.

    Returns:
        (...).
    """
    count = torch.full((), values.shape[-1], device=values.device)
    if weight is not None:
        count = (weight > 0.0).sum()
        values = torch.where(weight > 0.0, values, torch.inf)
    ordered = values.sort(dim=-1).values
    at = share * (count - 1).clamp(min=0)
    below = at.floor().long()
    above = torch.minimum(below + 1, (count - 1).clamp(min=0))
    low, high = (ordered.index_select(-1, rank[None])[..., 0] for rank in (below, above))
    return torch.lerp(low, high, at - below)


def _kept(
    head_params: Tensors, features: Tensor, y: Tensor, weight: Tensor | None, hyper: Mapping[str, Tensor]
) -> Tensor:
    """(B, F) 1 where a feature stays, 0 where it is hidden."""
    rows = head_params["head.weight"]
    quiet = (rows < quantile(rows, 1.0 - hyper["features"])[:, None]).to(features.dtype)[y]
    right = torch.softmax(head(head_params, features), dim=-1).gather(1, y[:, None])[:, 0]
    left = torch.softmax(head(head_params, features * quiet), dim=-1).gather(1, y[:, None])[:, 0]
    loss = right - left
    intact = loss < quantile(loss, 1.0 - hyper["windows"], weight)
    return torch.where(intact[:, None], 1.0, quiet)
