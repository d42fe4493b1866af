"""Our layers are torch's layers, with window weights and without hidden state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from wearfleet_models.layers import BatchNorm, Conv, Dropout, MaxPool, Standardise
from wearfleet_protos.errors import ConfigError


def _innermost(x: Tensor) -> Tensor:
    """The same numbers with the channels side by side in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _run(layer: nn.Module, x: Tensor, *args: object) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of a fixed random functional of it for the input and all parameters."""
    x = x.detach().requires_grad_()
    out = layer(x, *args)
    probe = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).reshape(out.shape).sin()
    return out, list(torch.autograd.grad((out * probe).sum(), [x, *layer.parameters()]))


def _norms(channels: int) -> tuple[BatchNorm, nn.BatchNorm1d]:
    ours, theirs = BatchNorm(channels), nn.BatchNorm1d(channels)
    with torch.no_grad():
        ours.weight.copy_(torch.linspace(0.5, 1.5, channels))
        ours.bias.copy_(torch.linspace(-1.0, 1.0, channels))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("order", [Tensor.contiguous, _innermost])
@pytest.mark.parametrize("weighted", [False, True])
def test_batch_norm_is_torchs_when_every_window_weighs_one(order, weighted: bool) -> None:
    ours, theirs = _norms(5)
    x = order(3.0 + 2.0 * torch.randn(7, 5, 11, generator=torch.Generator().manual_seed(1)))
    for _ in range(3):
        out, grads = _run(ours, x, torch.ones(7) if weighted else None)
        expected, expected_grads = _run(theirs, x)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-5)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_batch_norm_ignores_windows_of_weight_zero() -> None:
    padded, short = _norms(3)[0], _norms(3)[0]
    x = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(2))
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    junk = torch.cat([x[:4], 1e3 * x[4:]])
    out = padded(junk, weight)
    expected = short(x[:4], torch.ones(4))
    torch.testing.assert_close(out[:4], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded.state_dict(), short.state_dict(), rtol=1e-5, atol=1e-6)


def test_batch_norm_keeps_its_statistics_on_a_batch_of_padding() -> None:
    layer = BatchNorm(3)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert layer(torch.zeros(4, 3, 8), torch.zeros(4)).isfinite().all()
    assert torch.equal(layer.running_mean, before["running_mean"])
    assert torch.equal(layer.running_var, before["running_var"])


def test_batch_norm_writes_new_statistics_into_the_tensors_it_was_given() -> None:
    layer = BatchNorm(3)
    own = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    given = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    inputs = dict(given)
    functional_call(layer, given, (torch.randn(4, 3, 8), torch.ones(4)))
    assert int(given["num_batches_tracked"]) == 1
    assert not torch.equal(given["running_mean"], inputs["running_mean"])
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, own[name]), name


@pytest.mark.parametrize("weighted", [False, True])
def test_batch_norm_has_the_right_gradient(weighted: bool) -> None:
    layer = BatchNorm(2).double()
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64) if weighted else None

    def function(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        buffers = dict(layer.named_buffers())
        return functional_call(layer, {"weight": gain, "bias": shift, **buffers}, (x, weight))

    generator = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 2, 4), (2,), (2,))
    ]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("order", [Tensor.contiguous, _innermost])
@pytest.mark.parametrize(("length", "size"), [(12, 2), (13, 2), (1 + 9, 3), (2, 2)])
def test_max_pool_trains_as_it_evaluates_gradients_and_ties_included(order, length: int, size: int) -> None:
    layer = MaxPool(size)
    x = order(torch.randint(-3, 3, (4, 3, length), generator=torch.Generator().manual_seed(4)).float())
    out, grads = _run(layer.train(), x)
    expected, expected_grads = _run(layer.eval(), x)
    assert torch.equal(out, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("order", [Tensor.contiguous, _innermost])
def test_convolution_is_torchs_in_both_memory_orders(order) -> None:
    ours, theirs = Conv(6, 4, 5), nn.Conv1d(6, 4, 5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(5))
    (out, grads), (expected, expected_grads) = _run(ours, order(x)), _run(theirs, x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_expectation_and_repeats_for_a_key() -> None:
    layer, x = Dropout(0.2, salt=3), torch.ones(200, 500)
    first = layer(x, torch.tensor(11))
    assert torch.equal(first, layer(x, torch.tensor(11)))
    assert not torch.equal(first, layer(x, torch.tensor(12)))
    assert not torch.equal(first, Dropout(0.2, salt=4)(x, torch.tensor(11)))
    assert set(first.unique().tolist()) == {0.0, 1.25}
    assert abs(float(first.mean()) - 1.0) < 5 * 0.5 / (200 * 500) ** 0.5


def test_dropout_is_the_identity_in_evaluation_without_a_key_and_with_p_zero() -> None:
    x = torch.randn(3, 4)
    assert Dropout(0.5, 0).eval()(x, torch.tensor(1)) is x
    assert Dropout(0.5, 0)(x, None) is x
    assert Dropout(0.0, 0)(x, torch.tensor(1)) is x


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_dropout_refuses_a_share_outside_its_range(p: float) -> None:
    with pytest.raises(ConfigError, match="dropout"):
        Dropout(p, 0)


@pytest.mark.parametrize("order", [Tensor.contiguous, _innermost])
def test_standardise_removes_mean_and_scale_by_channel(order) -> None:
    layer = Standardise(2)
    layer.mean.copy_(torch.tensor([1.0, -2.0]))
    layer.std.copy_(torch.tensor([2.0, 4.0]))
    x = order(torch.tensor([[[3.0, 5.0, 1.0], [2.0, -2.0, 6.0]]]))
    torch.testing.assert_close(layer(x), torch.tensor([[[1.0, 2.0, 0.0], [1.0, 0.0, 2.0]]]))
    assert layer(x).stride() == x.stride()
    means = torch.tensor([[1.0, -2.0], [0.0, 2.0]])  # of two runs, stacked
    std = torch.ones(2)
    stacked = vmap(lambda mean: functional_call(layer, {"mean": mean, "std": std}, (x,)))(means)
    torch.testing.assert_close(stacked, x - means[:, None, :, None])


def test_layers_stack_over_runs() -> None:
    norm, pool = BatchNorm(2), MaxPool(2)

    def loss(gain: Tensor, x: Tensor) -> Tensor:
        tensors = {"weight": gain, "bias": torch.zeros(2), **dict(norm.named_buffers())}
        return pool(functional_call(norm, tensors, (x, None))).square().sum()

    gains = torch.tensor([[1.0, 2.0], [0.5, 3.0]])
    x = torch.randn(2, 4, 2, 6, generator=torch.Generator().manual_seed(6))
    stacked = vmap(grad(loss))(gains, x)
    single = torch.stack([grad(loss)(gains[run], x[run]) for run in range(2)])
    torch.testing.assert_close(stacked, single, rtol=1e-5, atol=1e-5)
