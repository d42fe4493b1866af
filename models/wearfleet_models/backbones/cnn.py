"""Two-block convolutional network.

Source: HAROOD's "medium" CNN (specs/ood.md 1.4): conv 16, conv 32, each with batch normalisation, ReLU,
max-pool 2.
Differs: one-dimensional convolutions over (B, C, T) instead of two-dimensional ones over (B, C, 1, T); the
pool comes before the ReLU, which is the same function with half of the work.
"""

import torch
from torch import Tensor, nn
from wearfleet_protos.errors import ConfigError

from wearfleet_models.layers import BatchNorm, Conv, MaxPool

__all__ = ["Cnn"]


class Cnn(nn.Module):
    """(B, C, T) -> features (B, 32 * L2), L1 = (T - k + 1) // 2, L2 = (L1 - k + 1) // 2.

    Raises:
        ConfigError: the window is too short for two convolutions and pools.
    """

    def __init__(self, channels: int, window: int, kernel: int = 9) -> None:
        super().__init__()
        length = ((window - kernel + 1) // 2 - kernel + 1) // 2
        if length < 1:
            raise ConfigError(
                f"a window of {window} samples is too short for kernel {kernel}; it needs {3 * kernel + 1}"
            )
        self.conv1 = Conv(channels, 16, kernel)
        self.norm1 = BatchNorm(16)
        self.pool1 = MaxPool(2)
        self.conv2 = Conv(16, 32, kernel)
        self.norm2 = BatchNorm(32)
        self.pool2 = MaxPool(2)
        self.num_features = 32 * length

    def forward(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature for all backbones
        """Features of every window.

        Args:
            x: (B, C, T) standardised.
            weight: (B,) weight of each window for batch statistics, None for ones.
            rng: () int64 key; unused, there is no dropout.

        Returns:
            (B, num_features).
        """
        x = torch.relu(self.pool1(self.norm1(self.conv1(x), weight)))
        x = torch.relu(self.pool2(self.norm2(self.conv2(x), weight)))
        return x.flatten(1)
