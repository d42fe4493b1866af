"""The fast block against the three layers it stands for, in float64 so that near ties fall alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from wearfleet_models import normalised_pool
from wearfleet_models.layers import BatchNorm, MaxPool
from wearfleet_models.normalised_pool import normalise_pool_relu


def _case(length: int, domains: int, negative: bool) -> tuple[BatchNorm, Tensor]:
    generator = torch.Generator().manual_seed(length)
    norm = BatchNorm(5).double()
    norm.domains = domains
    with torch.no_grad():
        norm.weight.copy_(torch.rand(5, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(5, generator=generator))
        if negative:
            norm.weight[1::2] *= -1.0
    x = torch.randn(12, length, 5, generator=generator, dtype=torch.float64)
    x = x + 3.0 * torch.arange(12)[:, None, None] // 4
    return norm, x.transpose(1, 2).requires_grad_()


def _value_and_gradients(out: Tensor, norm: BatchNorm, x: Tensor) -> list[Tensor]:
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    statistics = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    return [out, *torch.autograd.grad(out, [x, norm.weight, norm.bias], slope), *statistics]


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("domains", [1, 3])
@pytest.mark.parametrize("length", [2, 7, 40])
def test_values_gradients_and_statistics_are_those_of_the_layers(
    length: int, domains: int, negative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    kernel = normalised_pool._NormalisePoolRelu
    monkeypatch.setattr(kernel, "apply", lambda *a, real=kernel.apply: calls.append(1) or real(*a))
    norm, x = _case(length, domains, negative)
    found = _value_and_gradients(normalise_pool_relu(norm, MaxPool(2), x, None), norm, x)
    norm, x = _case(length, domains, negative)
    expected = _value_and_gradients(torch.relu(MaxPool(2)(norm(x))), norm, x)
    assert len(calls) == 1
    # float64: 480 numbers a sum, eps 2e-16, values of a few units
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found[0].stride(1) == expected[0].stride(1) == 1


def test_gradients_are_those_of_finite_differences() -> None:
    norm, x = _case(6, 2, negative=True)

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return normalised_pool._NormalisePoolRelu.apply(x.transpose(1, 2), weight, bias, 2, 1e-5)[0]

    y = x.detach().transpose(1, 2).contiguous()[:4].requires_grad_()
    assert torch.autograd.gradcheck(block, (y, norm.weight, norm.bias))


@pytest.mark.parametrize("way", ["weights", "memory order", "vmap", "evaluation", "pool"])
def test_whatever_the_fast_way_does_not_know_goes_through_the_layers(way: str, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("the fast way was taken")

    monkeypatch.setattr(normalised_pool._NormalisePoolRelu, "apply", fails)
    norm, x = _case(12, 1, negative=False)
    weight, pool = None, MaxPool(3 if way == "pool" else 2)
    if way == "weights":
        weight = torch.ones(12, dtype=torch.float64)
    if way == "memory order":
        x = x.detach().contiguous()
    if way == "evaluation":
        norm.eval()
    if way == "vmap":
        stacked = vmap(lambda one: normalise_pool_relu(norm, pool, one, None))(x[None])
        assert stacked.shape == (1, 12, 5, 6)
    else:
        assert normalise_pool_relu(norm, pool, x, weight).shape == (12, 5, 4 if way == "pool" else 6)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    norm, x = _case(6, 1, negative=False)
    (slope,) = torch.autograd.grad(
        normalise_pool_relu(norm, MaxPool(2), x, None).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        slope.square().sum().backward()
