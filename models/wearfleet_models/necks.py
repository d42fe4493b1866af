"""What stands between backbone and head: the embedding that a training algorithm works on.

The head takes what a neck returns, and so does everything that looks at a model's embedding (out-of-distribution
score, exported graph). A neck is part of the network that predicts; modules that only training needs belong to the
algorithm.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from wearfleet_models.layers import BatchNorm

__all__ = ["NECKS", "Activation", "Adapter", "Bottleneck", "Branches", "Dense", "Identity", "Mixture", "Neck"]


class Neck(Protocol):
    """From features to the embedding that the head takes."""

    num_features: int

    def __call__(self, features: Tensor, weight: Tensor | None) -> Tensor:
        """(B, F), (B,) -> (B, num_features)."""


class Identity(nn.Module):
    """The features themselves; no tensors."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor, weight: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature for all necks
        """(B, F) -> (B, F)."""
        return features


class Activation(nn.Module):
    """A bounded or rectified copy of the features, number by number; no tensors.

    Source: Krishnamachari et al. 2024 (URM): the noise that features are compared with is uniform over the range of
    the activation.
    """

    def __init__(self, features: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_features = features
        self.function = function

    def forward(self, features: Tensor, weight: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature for all necks
        """(B, F) -> (B, F)."""
        return self.function(features)


class Bottleneck(nn.Module):
    """Linear layer and batch normalisation, no activation.

    Source: the bottleneck of DIFEX, FIXED, SDMix and DIVERSIFY in their published code (specs/ood.md 3.1 to 3.4).
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, width)
        self.norm = BatchNorm(width)
        self.num_features = width

    def forward(self, features: Tensor, weight: Tensor | None = None) -> Tensor:
        """(B, F), weight (B,) of each window in batch statistics, None for ones -> (B, width)."""
        embedding: Tensor = self.norm(self.linear(features), weight)
        return embedding


class Dense(nn.Module):
    """Linear layer and ReLU.

    Source: the last layer before the heads of DDLearn (Qin et al. 2023, arXiv:2306.04641; specs/ood.md 3.5).
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, width)
        self.num_features = width

    def forward(self, features: Tensor, weight: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature for all necks
        """(B, F) -> (B, width)."""
        return torch.relu(self.linear(features))


class Adapter(nn.Module):
    """Attention over the numbers of a frozen embedding: ``F softmax(W2 tanh(W1 f + c1) + c2) * f``.

    Source: FedCLIP, Lu et al. 2023, arXiv:2302.13485 (specs/federated.md section 7).
    Differs: multiplied by F, so that equal attention leaves the features as they are and a head that was trained on
    them still fits (behind CLIP's normalisation the factor means nothing).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, features)
        self.second = nn.Linear(features, features)
        self.num_features = features

    def forward(self, features: Tensor, weight: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature for all necks
        """(B, F) -> (B, F)."""
        attention = torch.softmax(self.second(torch.tanh(self.first(features))), dim=1)
        return self.num_features * attention * features


class Mixture(nn.Module):
    """A branch for every source domain, weighed by which domain a window looks like, plus a branch for all.

    ``sum_a q_a(f) E_a(f) + E_0(f)`` with ``q = softmax(G f)``; each ``E`` is a linear layer and ReLU.

    Args:
        features: F.
        width: W, of every branch.
        domains: S, number of source domains.

    Source: AFFAR, Qin et al. 2022, arXiv:2207.11221, as reconstructed in specs/ood.md 3.6 (no code was published).
    """

    def __init__(self, features: int, width: int, domains: int) -> None:
        super().__init__()
        self.branches = Branches(features, width, domains)
        self.domain = nn.Linear(features, domains)
        self.invariant = nn.Linear(features, width)
        self.num_features = width

    def forward(self, features: Tensor, weight: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature for all necks
        """(B, F) -> (B, W)."""
        specific, invariant, _ = self.parts(features)
        return specific + invariant

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the training algorithm looks at.

        Args:
            features: (B, F) of the backbone.

        Returns:
            specific (B, W): the branches of the domains, mixed; invariant (B, W): the branch for all; domain logits
            (B, S). The embedding is specific + invariant.
        """
        domain_logits: Tensor = self.domain(features)
        share = torch.softmax(domain_logits, dim=1).unsqueeze(1)
        specific = (share @ self.branches(features)).squeeze(1)
        return specific, torch.relu(self.invariant(features)), domain_logits


class Branches(nn.Module):
    """Linear layers and ReLU side by side, as one matrix product.

    Each branch has the initial weights of an ``nn.Linear``.
    """

    def __init__(self, features: int, width: int, count: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(features)
        self.weight = nn.Parameter(torch.empty(count, width, features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, S, W)."""
        flat = nn.functional.linear(features, self.weight.flatten(0, 1), self.bias.flatten())
        return torch.relu(flat).reshape(features.shape[0], *self.bias.shape)


NECKS: Final[Mapping[str, Callable[[int, int, int], nn.Module]]] = {
    "none": lambda features, _width, _domains: Identity(features),
    "bottleneck": lambda features, width, _domains: Bottleneck(features, width),
    "dense": lambda features, width, _domains: Dense(features, width),
    "tanh": lambda features, _width, _domains: Activation(features, torch.tanh),
    "relu": lambda features, _width, _domains: Activation(features, torch.relu),
    "sigmoid": lambda features, _width, _domains: Activation(features, torch.sigmoid),
    "mixture": Mixture,
    "adapter": lambda features, _width, _domains: Adapter(features),
}
"""Name -> neck of (number of features, width, number of source domains)."""
