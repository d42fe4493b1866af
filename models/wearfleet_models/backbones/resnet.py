"""ResNet for time series: three residual blocks and the mean over time.

Source: Wang, Yan and Oates 2017, "Time Series Classification from Scratch with Deep Neural Networks",
arXiv:1611.06455, section 3: blocks of 64, 128 and 128 filters, three convolutions each with batch normalisation and
ReLU, a shortcut around them, global average pooling.
Differs: convolutions over 7, 5, 3 samples instead of 8, 5, 3, so that the padding is the same on both sides; the
shortcut is a convolution over one sample only where the number of filters changes.
"""

import torch
from torch import Tensor, nn

from wearfleet_models.layers import BatchNorm, Conv

__all__ = ["ResNet"]

_FILTERS, _KERNELS = (64, 128, 128), (7, 5, 3)


class ResNet(nn.Module):
    """(B, C, T) -> features (B, 128), for windows of any length."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inputs = (channels, *_FILTERS[:-1])
        self.blocks = nn.ModuleList(_Block(a, b) for a, b in zip(inputs, _FILTERS, strict=True))
        self.num_features = _FILTERS[-1]

    def forward(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature for all backbones
        """Features of every window.

        Args:
            x: (B, C, T) standardised.
            weight: (B,) weight of each window for batch statistics, None for ones.
            rng: () int64 key; unused, there is no dropout.

        Returns:
            (B, 128).
        """
        for block in self.blocks:
            x = block(x, weight)
        return x.mean(dim=2)


class _Block(nn.Module):
    """Three convolutions, each normalised, and what came in added before the last ReLU."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        inputs = (channels, filters, filters)
        self.convolutions = nn.ModuleList(Conv(n, filters, k) for n, k in zip(inputs, _KERNELS, strict=True))
        self.norms = nn.ModuleList(BatchNorm(filters) for _ in _KERNELS)
        changes = channels != filters
        self.shortcut = Conv(channels, filters, 1) if changes else None
        self.shortcut_norm = BatchNorm(filters) if changes else None

    def forward(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """(B, C, T) -> (B, filters, T)."""
        shortcut = x
        if self.shortcut is not None and self.shortcut_norm is not None:
            shortcut = self.shortcut_norm(self.shortcut(x), weight)
        last = len(_KERNELS) - 1
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(_padded(x, _KERNELS[index] // 2)), weight)
            x = torch.relu(x + shortcut if index == last else x)
        return x


def _padded(x: Tensor, margin: int) -> Tensor:
    """(B, C, T) -> (B, C, T + 2 margin), zeros at both ends; a concatenation, which training plans know."""
    zeros = torch.zeros_like(x[:, :, :1]).expand(-1, -1, margin)
    return torch.cat([zeros, x, zeros], dim=2)
