"""Convolutional networks of one to four blocks.

Source: HAROOD's "small", "medium" and "large" CNN (specs/ood.md 1.4): blocks of 16, 16-32 or 16-32-32-32 filters, each
a convolution, batch normalisation, ReLU and max-pool of 2. DDLearn's (Qin et al. 2023, arXiv:2306.04641; specs/ood.md
3.5): blocks of 16-32 or 16-32-64 filters without the normalisation.
Differs: one-dimensional convolutions over (B, C, T) instead of two-dimensional ones over (B, C, 1, T); the
pool comes before the ReLU, which is the same function with half of the work; the number of features follows from the
window, where the original's small and large networks state it for windows of 200 samples and fail on others.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from wearfleet_protos.errors import ConfigError

from wearfleet_models.layers import BatchNorm, Conv, MaxPool
from wearfleet_models.normalised_pool import normalise_pool_relu

__all__ = ["Cnn"]


class Cnn(nn.Module):
    """(B, C, T) -> features (B, F): the last block's filters times what the blocks leave of the window.

    A block turns L samples into (L - k + 1) // 2.

    Args:
        channels: C.
        window: T, samples.
        kernel: k, samples.
        filters: of each block.
        normalise: whether blocks have batch normalisation.

    Raises:
        ConfigError: the window is too short for the blocks.
    """

    def __init__(
        self,
        channels: int,
        window: int,
        kernel: int = 9,
        filters: Sequence[int] = (16, 32),
        *,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        length, needed = window, 1
        for _ in filters:
            length, needed = (length - kernel + 1) // 2, 2 * needed + kernel - 1
        if length < 1:
            raise ConfigError(
                f"a window of {window} samples is too short for kernel {kernel}; it needs {needed}"
            )
        self.blocks = len(filters)
        self.normalise = normalise
        for number, (inputs, outputs) in enumerate(pairwise((channels, *filters)), start=1):
            self.add_module(f"conv{number}", Conv(inputs, outputs, kernel))
            if normalise:
                self.add_module(f"norm{number}", BatchNorm(outputs))
            self.add_module(f"pool{number}", MaxPool(2))
        self.num_features = filters[-1] * length

    def forward(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature for all backbones
        """Features of every window.

        Args:
            x: (B, C, T) standardised.
            weight: (B,) weight of each window for batch statistics, None for ones.
            rng: () int64 key; unused, there is no dropout.

        Returns:
            (B, num_features).
        """
        for number in range(1, self.blocks + 1):
            x, pool = self.get_submodule(f"conv{number}")(x), self.get_submodule(f"pool{number}")
            if self.normalise:
                norm = cast("BatchNorm", self.get_submodule(f"norm{number}"))
                x = normalise_pool_relu(norm, cast("MaxPool", pool), x, weight)
            else:
                x = torch.relu(pool(x))
        return x.flatten(1)
