"""The wrapper that makes two launches one differentiable, stackable operation."""

import pytest
import torch
from torch.func import grad, vmap
from wearfleet_cloud.kernels.dispatch import takes_triton
from wearfleet_cloud.kernels.operation import operation

launches = []


def forward(power, x, y, weight):
    launches.append(x.shape)
    return (weight * x**power * y).sum(1), x**power


def backward(power, needs, x, y, weight, xp, gradient):
    scaled = gradient[:, None] * weight
    both = (scaled * power * x ** (power - 1) * y, scaled * xp)
    return tuple(g for g, needed in zip(both, needs, strict=True) if needed)


monomial = operation(forward, backward, values=1, differentiable=2)


def value(x, y, weight):
    return monomial(3, x[None], y[None], weight[None])[0][0]


def plain(x, y, weight):
    return (weight * x**3 * y).sum()


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_gradients_are_those_of_the_launch(tensors):
    x, y, weight = (t[0] for t in tensors)
    assert torch.autograd.gradcheck(
        lambda a, b: value(a, b, weight), (x.requires_grad_(), y.requires_grad_())
    )


def test_only_needed_gradients_are_asked_for(tensors):
    x, y, weight = (t[0] for t in tensors)
    asked = []

    def spy(settings, needs, *rest):
        asked.append(needs)
        return backward(settings, needs, *rest)

    result = operation(forward, spy, values=1, differentiable=2)(
        3, x[None], y[None].requires_grad_(), weight[None]
    )
    result[0].sum().backward()
    assert asked == [(False, True)]


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (1, 0, None)])
def test_stacked_runs_are_one_launch_and_equal_single_runs(tensors, in_dims):
    given = [t if d is not None else t[0] for t, d in zip(tensors, in_dims, strict=True)]
    given = [t.T.contiguous() if d == 1 else t for t, d in zip(given, in_dims, strict=True)]
    launches.clear()
    found = vmap(grad(value, argnums=(0, 1)), in_dims)(*given)
    assert len(launches) == 1
    expected = vmap(grad(plain, argnums=(0, 1)), in_dims)(*given)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_second_derivative_is_refused(tensors):
    x, y, weight = (t[0] for t in tensors)
    with pytest.raises(RuntimeError, match="reference"):
        grad(lambda a: grad(value)(a, y, weight).sum())(x)


def test_the_reference_serves_the_processor_and_float64():
    assert not takes_triton(torch.zeros(2))
    assert not takes_triton(torch.zeros(2, dtype=torch.float64))
