"""DeepConvLSTM: convolutions over time in every channel, then two recurrent layers.

Source: Ordóñez and Roggen 2016, "Deep Convolutional and LSTM Recurrent Neural Networks for Multimodal Wearable
Activity Recognition", Sensors 16(1):115: four convolutions of 64 filters over 5 samples with ReLU, filters shared by
the channels; two LSTM layers of 128 cells; the last state goes to the classifier.
Differs: the share of dropout before the LSTM layers is a setting (0.5 in the paper).

It trains alone and stacked and exports to ONNX, but has no training plan for devices: the plan compiler knows no
recurrent operator and says so.
"""

import torch
from torch import Tensor, nn
from wearfleet_protos.errors import ConfigError

from wearfleet_models.layers import Conv, Dropout
from wearfleet_models.recurrent import Lstm

__all__ = ["DeepConvLstm"]

_FILTERS, _KERNEL, _CONVOLUTIONS, _CELLS = 64, 5, 4, 128


class DeepConvLstm(nn.Module):
    """(B, C, T) -> features (B, 128): the state of the upper layer after the last sample.

    Args:
        channels: C.
        window: T, samples.
        dropout: share of dropped activations before each recurrent layer.

    Raises:
        ConfigError: the window is too short for four convolutions.
    """

    def __init__(self, channels: int, window: int, dropout: float = 0.2) -> None:
        super().__init__()
        needed = _CONVOLUTIONS * (_KERNEL - 1) + 1
        if window < needed:
            raise ConfigError(
                f"a window of {window} samples is too short for DeepConvLSTM; it needs {needed}"
            )
        self.convolutions = nn.ModuleList(
            Conv(1 if index == 0 else _FILTERS, _FILTERS, _KERNEL) for index in range(_CONVOLUTIONS)
        )
        self.dropout1 = Dropout(dropout, 0)
        self.lstm1 = Lstm(channels * _FILTERS, _CELLS)
        self.dropout2 = Dropout(dropout, 1)
        self.lstm2 = Lstm(_CELLS, _CELLS)
        self.num_features = _CELLS

    def forward(self, x: Tensor, weight: Tensor | None = None, rng: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature for all backbones
        """Features of every window.

        Args:
            x: (B, C, T) standardised.
            weight: (B,); unused, nothing here looks across windows.
            rng: () int64 key of the dropout masks; None for no dropout.

        Returns:
            (B, 128).
        """
        batch, channels, samples = x.shape
        maps = x.reshape(batch * channels, 1, samples)
        for convolution in self.convolutions:
            maps = torch.relu(convolution(maps))
        rows = maps.reshape(batch, channels * _FILTERS, maps.shape[2]).transpose(1, 2)
        states = self.lstm2(self.dropout2(self.lstm1(self.dropout1(rows, rng)), rng))
        last: Tensor = states[:, -1]
        return last
