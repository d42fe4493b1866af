"""One encoder for each kind of sensor in a window, put together only behind them.

Source: late fusion in its plain form, the encoders' features side by side before one classifier, on the Transformer of
``transformer``; with low-rank factors it is the network of EPFL for windows of several sensors (arXiv:2504.10817).
Differs: FHBench's networks have one modality each.

The features of an encoder are all its tokens, as in ``transformer``, not their mean: with one kind of sensor the two
are the same network, with several they have heads of the same size and differ in which channels attend to each other.
A token more costs 64 numbers a class in the head and nothing else. A sensor of one channel has one token, which attends
to itself: its encoder learns by values, and its queries get no gradient.

A sensor that a wearer does not have is left out: a kind whose channels all stand still throughout a window (as they do
where a driver fills in a number, because nothing that is not finite reaches a model) has features of zero, and the
others' are multiplied by kinds / kinds present, as dropout would. So nothing of it reaches the result, its encoder gets
no gradient, and the logits keep their size. The price: a sensor so coarse that it gives one number for a whole window
is not looked at there.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from wearfleet_protos.errors import ConfigError

from wearfleet_models.backbones.transformer import Transformer

__all__ = ["MultimodalTransformer"]

_SALTS = 4
"""Of the dropout masks of one encoder: two layers, two masks each."""


class MultimodalTransformer(nn.Module):
    """(B, C, T) -> features (B, 64 C): 64 numbers a channel, the channels of kind 0 first.

    Args:
        modalities: (C,) the kind of sensor of each channel, 0 to G - 1, each of them at least once.
        window: T, samples.
        dropout: share of dropped activations.
        feedforward: width of the feed-forward blocks.
        rank: of low-rank additions to queries and values; 0 for none.

    Raises:
        ConfigError: the window is so short that every sensor stands still.
    """

    def __init__(
        self, modalities: Sequence[int], window: int, *, dropout: float, feedforward: int, rank: int
    ) -> None:
        super().__init__()
        if window < 2:
            raise ConfigError(f"a window of {window} sample cannot show which sensors are there; it needs 2")
        self.stretches = [_stretches(modalities, kind) for kind in range(max(modalities) + 1)]
        encoders = [
            Transformer(
                modalities.count(kind),
                window,
                dropout=dropout,
                feedforward=feedforward,
                rank=rank,
                first_salt=_SALTS * kind,
            )
            for kind in range(len(self.stretches))
        ]
        self.encoders = nn.ModuleList(encoders)
        self.num_features = sum(encoder.num_features for encoder in encoders)

    def forward(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:
        """Features of every window.

        Args:
            x: (B, C, T) standardised.
            weight: (B,); unused, nothing here looks across windows.
            rng: () int64 key of the dropout masks; None for no dropout.

        Returns:
            (B, num_features).
        """
        windows = [torch.cat([x[:, a:b] for a, b in stretches], dim=1) for stretches in self.stretches]
        present = [_moves(window) for window in windows]
        scale = len(windows) / torch.clamp(torch.stack(present).sum(dim=0), min=1.0)
        features = [
            encoder(window, weight, rng) * (there * scale)[:, None]
            for encoder, window, there in zip(self.encoders, windows, present, strict=True)
        ]
        return torch.cat(features, dim=1)


def _stretches(modalities: Sequence[int], kind: int) -> list[tuple[int, int]]:
    """First channel and the one after the last of each run of a kind."""
    runs = [list(run) for own, run in groupby(range(len(modalities)), modalities.__getitem__) if own == kind]
    return [(run[0], run[-1] + 1) for run in runs]


def _moves(window: Tensor) -> Tensor:
    """(B, C, T) -> (B,) 1 where any channel has two numbers in its window, else 0."""
    return ((window - window[:, :, :1]).abs().amax(dim=(1, 2)) > 0).to(window.dtype)
