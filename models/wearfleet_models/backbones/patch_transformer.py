"""Encoder over time: every patch of consecutive samples, all channels together, is one token.

The benchmark's Transformer takes channels for tokens, so the order in which things happen within a window is left to
one linear layer. Here it is what attention looks at.

Source: ours; patches as tokens as in Nie et al. 2023, arXiv:2211.14730 (PatchTST), normalisation before each block as
in Xiong et al. 2020, arXiv:2002.04745.
Differs from PatchTST: channels share a token instead of being encoded one by one, patches do not overlap, layer
instead of batch normalisation, and the features are the mean over the tokens, so that their number does not depend on
the window.
"""

import math

import torch
from torch import Tensor, nn
from wearfleet_protos.errors import ConfigError

from wearfleet_models.backbones.attention import attend
from wearfleet_models.layers import Dropout

__all__ = ["PatchTransformer"]

_WIDTH, _HEADS, _LAYERS, _FEEDFORWARD = 64, 8, 2, 256


class PatchTransformer(nn.Module):
    """(B, C, T) -> features (B, 64). The T % patch last samples of a window are not looked at.

    Args:
        channels: C.
        window: T, samples.
        patch: samples a token.
        dropout: share of dropped activations.

    Raises:
        ConfigError: the window holds fewer than two patches.
    """

    def __init__(self, channels: int, window: int, patch: int = 9, dropout: float = 0.2) -> None:
        super().__init__()
        if window < 2 * patch:
            raise ConfigError(
                f"a window of {window} samples is too short for patches of {patch}; it needs {2 * patch}"
            )
        self.patch = patch
        self.patches = window // patch
        self.embed = nn.Linear(channels * patch, _WIDTH)
        self.place_embedding = nn.Parameter(0.02 * torch.randn(self.patches, _WIDTH))
        self.layers = nn.ModuleList(_EncoderLayer(dropout, salt=2 * index) for index in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.num_features = _WIDTH

    def forward(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature for all backbones
        """Features of every window.

        Args:
            x: (B, C, T) standardised.
            weight: (B,); unused, nothing here looks across windows.
            rng: () int64 key of the dropout masks; None for no dropout.

        Returns:
            (B, 64).
        """
        batch, channels, _ = x.shape
        pieces = x[:, :, : self.patches * self.patch].reshape(batch, channels, self.patches, self.patch)
        tokens = self.embed(pieces.transpose(1, 2).reshape(batch, self.patches, channels * self.patch))
        tokens = tokens + self.place_embedding
        for layer in self.layers:
            tokens = layer(tokens, rng)
        features: Tensor = self.norm(tokens).mean(dim=1)
        return features


class _EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block, each behind a layer normalisation and added to what came."""

    def __init__(self, dropout: float, salt: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(_WIDTH)
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.out = nn.Linear(_WIDTH, _WIDTH)
        self.norm2 = nn.LayerNorm(_WIDTH)
        self.expand = nn.Linear(_WIDTH, _FEEDFORWARD)
        self.contract = nn.Linear(_FEEDFORWARD, _WIDTH)
        self.dropout1 = Dropout(dropout, salt)
        self.dropout2 = Dropout(dropout, salt + 1)

    def forward(self, tokens: Tensor, rng: Tensor | None) -> Tensor:
        """(B, N, W) -> (B, N, W)."""
        mixed = attend(self.qkv(self.norm1(tokens)), _HEADS, scale=math.sqrt(_WIDTH // _HEADS))
        tokens = tokens + self.dropout1(self.out(mixed), rng)
        expanded = self.contract(torch.relu(self.expand(self.norm2(tokens))))
        added: Tensor = tokens + self.dropout2(expanded, rng)
        return added
