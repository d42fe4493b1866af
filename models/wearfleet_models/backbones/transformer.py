"""Encoder over sensor channels: every channel of a window is one token.

Source: HAROOD's Transformer (specs/ood.md 1.5): Linear(T -> 64) per channel, two post-norm encoder layers
with eight heads and a feed-forward width of 2048, dropout 0.2, features are all tokens side by side.
Differs (faults of the original, specs/ood.md P23): scores are divided by the square root of the head width,
not of the number of tokens; no mask by channel distance, because the order of channels is arbitrary; every
channel has a learned embedding, without which the encoder could not tell them apart. ``strict`` has these three
faults, to compare with published numbers. In both forms a batch of one window keeps its axis, and the decoder that
was never used does not exist.
"""

import math

import torch
from torch import Tensor, nn
from wearfleet_protos.errors import ConfigError

from wearfleet_models.backbones.attention import attend
from wearfleet_models.layers import Dropout
from wearfleet_models.low_rank import LowRankQkv

__all__ = ["Transformer"]

_STRICT_REACH = 12
"""Channels further apart than this do not see each other in the benchmark."""


class Transformer(nn.Module):
    """(B, C, T) -> features (B, C * width).

    Args:
        channels: C.
        window: T, samples.
        width: W of a token.
        heads: that share the width.
        layers: encoder layers.
        feedforward: width of the feed-forward blocks.
        dropout: share of dropped activations.
        strict: with the faults of the original.
        rank: of low-rank additions to queries and values; 0 for none.
        first_salt: of the dropout masks; two are used a layer.

    Raises:
        ConfigError: ``width`` is not divisible by ``heads``.
    """

    def __init__(
        self,
        channels: int,
        window: int,
        *,
        width: int = 64,
        heads: int = 8,
        layers: int = 2,
        feedforward: int = 2048,
        dropout: float = 0.2,
        strict: bool = False,
        rank: int = 0,
        first_salt: int = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"the width of the transformer ({width}) must be a multiple of its heads ({heads})"
            )
        self.embed = nn.Linear(window, width)
        self.channel_embedding = None if strict else nn.Parameter(0.02 * torch.randn(channels, width))
        scale, reach = (math.sqrt(channels), _STRICT_REACH) if strict else (math.sqrt(width // heads), None)
        self.layers = nn.ModuleList(
            _EncoderLayer(
                width,
                heads,
                feedforward,
                dropout,
                salt=first_salt + 2 * index,
                scale=scale,
                reach=reach,
                rank=rank,
            )
            for index in range(layers)
        )
        self.num_features = channels * width

    def forward(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature for all backbones
        """Features of every window.

        Args:
            x: (B, C, T) standardised.
            weight: (B,); unused, nothing here looks across windows.
            rng: () int64 key of the dropout masks; None for no dropout.

        Returns:
            (B, num_features).
        """
        tokens = self.embed(x)
        if self.channel_embedding is not None:
            tokens = tokens + self.channel_embedding
        for layer in self.layers:
            tokens = layer(tokens, rng)
        features: Tensor = tokens.flatten(1)
        return features


class _EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block, each followed by residual and layer normalisation."""

    def __init__(
        self,
        width: int,
        heads: int,
        feedforward: int,
        dropout: float,
        *,
        salt: int,
        scale: float,
        reach: int | None,
        rank: int,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.reach = reach
        self.qkv = LowRankQkv(width, rank) if rank else nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout1 = Dropout(dropout, salt)
        self.dropout2 = Dropout(dropout, salt + 1)

    def forward(self, tokens: Tensor, rng: Tensor | None) -> Tensor:
        """(B, C, W) -> (B, C, W)."""
        mixed = attend(self.qkv(tokens), self.heads, scale=self.scale, reach=self.reach)
        attended = self.dropout1(self.out(mixed), rng)
        tokens = self.norm1(tokens + attended)
        expanded = self.contract(torch.relu(self.expand(tokens)))
        normalised: Tensor = self.norm2(tokens + self.dropout2(expanded, rng))
        return normalised
