"""The recurrent layer is torch's, in training and in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from wearfleet_models.recurrent import Lstm


def _pair() -> tuple[Lstm, nn.LSTM]:
    torch.manual_seed(0)
    ours, theirs = Lstm(5, 7), nn.LSTM(5, 7, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.input_weight)
        theirs.weight_hh_l0.copy_(ours.hidden_weight)
        theirs.bias_ih_l0.copy_(ours.bias)
        theirs.bias_hh_l0.zero_()
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_are_those_of_torch(training: bool) -> None:
    ours, theirs = _pair()
    x = torch.randn(3, 11, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out, expected = ours.train(training)(x), theirs(x)[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    probe = torch.linspace(-1.0, 2.0, out.numel()).reshape(out.shape)
    mine = torch.autograd.grad((out * probe).sum(), [x, *ours.parameters()])
    parameters = [x, theirs.weight_ih_l0, theirs.weight_hh_l0, theirs.bias_ih_l0]
    torch.testing.assert_close(
        mine, torch.autograd.grad((expected * probe).sum(), parameters), rtol=1e-4, atol=1e-5
    )


def test_gradients_are_right_in_double_precision() -> None:
    layer = Lstm(2, 3).double()
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_it_stacks_over_runs() -> None:
    layers = [Lstm(5, 7), Lstm(5, 7)]
    x = torch.randn(2, 3, 6, 5)

    def loss(tensors: dict, x: torch.Tensor) -> torch.Tensor:
        return functional_call(layers[0], tensors, (x,)).square().sum()

    tensors = [{n: p.detach() for n, p in layer.named_parameters()} for layer in layers]
    stacked = vmap(grad(loss))({n: torch.stack([t[n] for t in tensors]) for n in tensors[0]}, x)
    for run in range(2):
        for name, expected in grad(loss)(tensors[run], x[run]).items():
            torch.testing.assert_close(stacked[name][run], expected, rtol=1e-4, atol=1e-5)
