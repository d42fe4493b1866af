"""A long short-term memory whose training pass is plain tensor arithmetic."""

import math
from typing import Final

import torch
from torch import Tensor, nn

__all__ = ["Lstm"]

_GATES: Final = 4  # input, forget, candidate, output: torch's order


class Lstm(nn.Module):
    """One layer: i, f, o = sigmoid(.), g = tanh(.) of W x + U h + b; c = f c + i g; h = o tanh(c); it starts at zero.

    Training walks through the samples with ordinary operators, which ``torch.func`` can stack over runs and a trace
    can turn into a plan (torch's own kernel allows neither), and is faster than that kernel on a CPU. Evaluation is
    torch's operator, which exports as one node. Values of both are equal.

    Args:
        inputs: I.
        width: W, numbers in h and in c.

    Source: Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000.
    Differs from torch: one bias instead of two that are only ever added.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(width)
        self.width = width
        self.input_weight = nn.Parameter(torch.empty(_GATES * width, inputs).uniform_(-bound, bound))
        self.hidden_weight = nn.Parameter(torch.empty(_GATES * width, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(_GATES * width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, I) -> h at every sample (B, T, W)."""
        return self._walk(x) if self.training else self._fused(x)

    def _walk(self, x: Tensor) -> Tensor:
        driven = x @ self.input_weight.t() + self.bias
        hidden = memory = torch.zeros_like(driven[:, 0, : self.width])
        states = []
        for drive in driven.unbind(1):
            gates = drive + hidden @ self.hidden_weight.t()
            let_in, keep, candidate, let_out = torch.split(gates, self.width, dim=1)
            memory = torch.sigmoid(keep) * memory + torch.sigmoid(let_in) * torch.tanh(candidate)
            hidden = torch.sigmoid(let_out) * torch.tanh(memory)
            states.append(hidden)
        return torch.stack(states, dim=1)

    def _fused(self, x: Tensor) -> Tensor:
        start = torch.zeros(1, x.shape[0], self.width, dtype=x.dtype, device=x.device)
        tensors = (self.input_weight, self.hidden_weight, self.bias, torch.zeros_like(self.bias))
        states, _, _ = torch.lstm(
            x,
            (start, start),
            tensors,
            has_biases=True,
            num_layers=1,
            dropout=0.0,
            train=False,
            bidirectional=False,
            batch_first=True,
        )
        return states
