"""What stands before a black-box network and is learned in its place: an auto-encoder with a client's code."""

import torch
from torch import Tensor, nn

__all__ = ["InputSurgery"]

_HIDDEN = 128


class InputSurgery(nn.Module):
    """From a standardised window to another: ``decode([encode(x), code])``.

    Args:
        channels: C.
        window: T.
        width: h, numbers that the encoder leaves of a window.
        code_width: k, numbers that say which client it is.

    Source: ZooPFL, Lu et al. 2023, arXiv:2310.05143; the layers are ours (specs/federated.md section 8).
    """

    def __init__(self, channels: int, window: int, width: int, code_width: int) -> None:
        super().__init__()
        self.shape = channels, window
        self.encoder = _perceptron(channels * window, width)
        self.decoder = _perceptron(width + code_width, channels * window)
        self.code = nn.Parameter(torch.zeros(code_width))

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, h + k): the window's numbers, then the client's."""
        numbers = self.encoder(x.flatten(1))
        return torch.cat([numbers, self.code.expand(x.shape[0], -1)], dim=1)

    def decode(self, numbers: Tensor) -> Tensor:
        """(B, h + k) -> (B, C, T)."""
        window: Tensor = self.decoder(numbers)
        return window.reshape(numbers.shape[0], *self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        return self.decode(self.encode(x))


def _perceptron(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, outputs))
