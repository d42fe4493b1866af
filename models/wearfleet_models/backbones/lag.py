"""Two views of a window, whole and in patches, each with its own network and bottleneck.

Source: LAG (local and global alignment, ICASSP 2022; specs/ood.md 2.8): the whole window goes through the ordinary CNN
or Transformer; cut into G patches it goes through a second one, to which the patches are rows beside the channels
(CNN) or tokens (Transformer). Each result passes a linear layer to 256 numbers and batch normalisation.
Differs: a convolution over (G, k // 2) of G rows is written as one over k // 2 samples of C G channels, which is the
same sum; G follows from the window by one rule, which gives the paper's numbers where it has them; the Transformers
are ours (see ``transformer``), so patches have a learned embedding.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from wearfleet_protos.errors import ConfigError

from wearfleet_models.backbones.cnn import Cnn
from wearfleet_models.backbones.transformer import Transformer
from wearfleet_models.necks import Bottleneck

__all__ = ["LocalGlobal", "lag_cnn", "lag_transformer", "patch_count"]

_WIDTH: Final = 256
_MOST_PATCHES, _SHORTEST_PATCH = 10, 10


class LocalGlobal(nn.Module):
    """(B, C, T) -> features (B, 512): 256 of the whole window, then 256 of its patches.

    Args:
        whole: network of the window.
        local: network of the patches.
        patches: G, a divisor of T.
        arrange: patches (B, C, G, T / G) -> what ``local`` takes.
    """

    def __init__(
        self,
        whole: Cnn | Transformer,
        local: Cnn | Transformer,
        patches: int,
        arrange: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.whole = whole
        self.local = local
        self.whole_neck = Bottleneck(whole.num_features, _WIDTH)
        self.local_neck = Bottleneck(local.num_features, _WIDTH)
        self.patches = patches
        self.arrange = arrange
        self.num_features = 2 * _WIDTH

    def forward(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:
        """Features of every window.

        Args:
            x: (B, C, T) standardised.
            weight: (B,) weight of each window for batch statistics, None for ones.
            rng: () int64 key of the dropout masks; None for no dropout.

        Returns:
            (B, 512).
        """
        batch, channels, samples = x.shape
        pieces = x.reshape(batch, channels, self.patches, samples // self.patches)
        whole = self.whole_neck(self.whole(x, weight, rng), weight)
        local = self.local_neck(self.local(self.arrange(pieces), weight, rng), weight)
        return torch.cat([whole, local], dim=1)


def lag_cnn(channels: int, window: int, kernel: int) -> LocalGlobal:
    """The CNN form.

    Args:
        channels: C.
        window: T, samples.
        kernel: k of the whole window's convolutions; those of the patches have k // 2, at least 1.

    Raises:
        ConfigError: the window or its patches are too short for the convolutions.
    """
    whole, patches = Cnn(channels, window, kernel), patch_count(window)
    try:
        local = Cnn(channels * patches, window // patches, max(1, kernel // 2))
    except ConfigError as error:
        raise ConfigError(f"a window of {window} samples is cut into {patches} patches: {error}") from error
    return LocalGlobal(whole, local, patches, _as_rows)


def lag_transformer(channels: int, window: int, dropout: float, feedforward: int) -> LocalGlobal:
    """The Transformer form; arguments as of :class:`Transformer`."""
    patches = patch_count(window)
    whole = Transformer(channels, window, dropout=dropout, feedforward=feedforward)
    local = Transformer(
        patches, channels * window // patches, dropout=dropout, feedforward=feedforward, first_salt=4
    )
    return LocalGlobal(whole, local, patches, _as_tokens)


def patch_count(window: int) -> int:
    """G: the most patches of equal length, at most 10, that have at least 10 samples; 1 where there is no such cut."""
    counts = range(1, _MOST_PATCHES + 1)
    return max(n for n in counts if n == 1 or (window % n == 0 and window // n >= _SHORTEST_PATCH))


def _as_rows(pieces: Tensor) -> Tensor:
    """(B, C, G, T / G) -> (B, C G, T / G)."""
    return pieces.flatten(1, 2)


def _as_tokens(pieces: Tensor) -> Tensor:
    """(B, C, G, T / G) -> (B, G, C T / G)."""
    return pieces.transpose(1, 2).flatten(2)
