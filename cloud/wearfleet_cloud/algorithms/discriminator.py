"""The network that tells domains apart, and the risk with which a featuriser is trained against it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from wearfleet_models.layers import BatchNorm

from wearfleet_cloud.algorithms.base import Tensors
from wearfleet_cloud.algorithms.losses import cross_entropy
from wearfleet_cloud.algorithms.passes import call_part, reverse_gradient

__all__ = ["Discriminator", "adversarial_risk", "domain_labels"]


class Discriminator(nn.Module):
    """Linear - BatchNorm - ReLU - Linear - BatchNorm - ReLU - Linear.

    Args:
        width: F, of the features.
        domains: D, of the logits.
        hidden: width of both hidden layers.

    Source: the benchmark's discriminator, specs/ood.md 2.4.
    """

    def __init__(self, width: int, domains: int, hidden: int = 256) -> None:
        super().__init__()
        self.layer1 = nn.Linear(width, hidden)
        self.norm1 = BatchNorm(hidden)
        self.layer2 = nn.Linear(hidden, hidden)
        self.norm2 = BatchNorm(hidden)
        self.layer3 = nn.Linear(hidden, domains)

    def forward(self, features: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits of the domains.

        Args:
            features: (B, F).
            weight: (B,) weight of each window in batch statistics, None for ones.

        Returns:
            (B, D).
        """
        hidden = torch.relu(self.norm1(self.layer1(features), weight))
        hidden = torch.relu(self.norm2(self.layer2(hidden), weight))
        logits: Tensor = self.layer3(hidden)
        return logits


def adversarial_risk(
    part: str,
    parts: Mapping[str, nn.Module],
    params: Tensors,
    buffers: Tensors,
    features: Tensor,
    labels: Tensor,
    alpha: Tensor,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensors]:
    """Cross-entropy of a discriminator, which learns to lower it; the features learn to raise it, ``alpha`` times.

    Args:
        part: name of the discriminator.
        parts: modules of training, that one among them.
        params: named parameters of everything.
        buffers: named buffers of everything; not changed.
        features: (B, F).
        labels: (B,) int64 what the discriminator is to tell.
        alpha: () strength of the reversal.
        weight: (B,) weight of each window, None for ones.

    Returns:
        () nats, and all buffers after the pass.

    Source: Ganin et al. 2016, arXiv:1505.07818, equations 13 to 15.
    """
    turned = reverse_gradient(features, alpha)
    logits, after = call_part(part, parts[part], params, buffers, turned, weight)
    return cross_entropy(logits, labels, weight), after


def domain_labels(domains: int, windows: int, device: torch.device) -> Tensor:
    """Number of the domain of every window of a pooled batch: (domains * windows,) int64."""
    return torch.arange(domains, device=device).repeat_interleave(windows)
