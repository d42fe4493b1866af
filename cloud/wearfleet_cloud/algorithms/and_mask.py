"""AND-mask: move a weight only where the gradients of the source domains agree on the direction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wearfleet_cloud.algorithms.base import Algorithm, AlgorithmInfo, Batch, State, Tensors
from wearfleet_cloud.algorithms.gradients import gradients, update
from wearfleet_cloud.algorithms.losses import accuracy, domain_risks
from wearfleet_cloud.algorithms.passes import call, pooled

__all__ = ["AndMask", "agreed"]


@dataclass(frozen=True, slots=True)
class AndMask(Algorithm):
    """Step along m gbar / mean(m), gbar = mean_d g_d, m = [|mean_d sign(g_d)| >= tau], g_d = gradient of R_d.

    One forward pass of all domains together, one backward pass a domain. tau = 1 keeps unanimous signs alone. A tensor
    without any keeps still but for the optimiser's momentum and weight decay, which the mask does not reach.

    Source: Parascandolo et al. 2021, arXiv:2009.00329, equation 2; the division by the kept share of each tensor from
    their code; specs/ood.md 2.12.
    """

    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="and-mask",
        title="AND-mask",
        paper="Parascandolo et al. 2021, arXiv:2009.00329",
        family="gradient agreement",
        needs=("domain labels", "per-domain gradients"),
        forward="joint",
        inference="backbone + head",
        hyper={"tau": 1.0},
        options={},
    )

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss", "accuracy" and "agreement", the share of |gbar|^2 that passes."""
        x, _, weight = pooled(batch)

        def risks(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            logits, after = call(self.model, params, buffers, x, weight, rng)
            logits = logits.reshape(*batch.y.shape, -1)
            right = accuracy(logits, batch.y, batch.weight)
            return domain_risks(logits, batch.y, batch.weight), ({"accuracy": right}, after)

        per_domain, losses, metrics, buffers = gradients(risks, state)
        means = {name: grads.mean(dim=0) for name, grads in per_domain.items()}
        masks = {name: agreed(grads, hyper["tau"]) for name, grads in per_domain.items()}
        grads = {name: mask * means[name] / (1e-10 + mask.mean()) for name, mask in masks.items()}
        passed = torch.stack([(mask * means[name].square()).sum() for name, mask in masks.items()]).sum()
        asked = torch.stack([mean.square().sum() for mean in means.values()]).sum()
        after = update(state._replace(buffers=buffers), grads, self.optimiser, hyper["lr"])
        return after, {"loss": losses.mean(), "agreement": passed / asked.clamp(min=1e-30), **metrics}


def agreed(grads: Tensor, tau: Tensor) -> Tensor:
    """1 where the signs of the gradients agree enough, else 0.

    Args:
        grads: (D, ...) of one tensor, by domain.
        tau: () least |mean of the signs|.

    Returns:
        (...) in the dtype of ``grads``.
    """
    return ((grads.sign().sum(dim=0) / grads.shape[0]).abs() >= tau).to(grads.dtype)
