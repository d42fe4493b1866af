"""The plan's layers against the models' own: values, gradients, statistics."""

import pytest
import torch
from oracles.small_federation import model
from torch import Tensor, nn
from torch.func import functional_call
from wearfleet_cloud.federated.plan_layers import (
    PlanBatchNorm,
    PlanDropout,
    PlanMaxPool,
    with_plan_layers,
)
from wearfleet_models.layers import BatchNorm, Dropout, MaxPool


def values_and_gradients(
    layer: nn.Module, x: Tensor, *rest: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Result, gradients to input and parameters of a random projection, buffers afterwards."""
    names = [name for name, _ in layer.named_parameters()]
    tensors = {
        name: t.detach().clone().requires_grad_(name in names) for name, t in layer.state_dict().items()
    }
    parameters = [tensors[name] for name in names]
    x = x.clone().requires_grad_()
    result = functional_call(layer, tensors, (x, *rest))
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=result.dtype)
    gradients = torch.autograd.grad((result * direction).sum(), [x, *parameters])
    return result.detach(), list(gradients), [t.detach() for n, t in tensors.items() if n not in names]


def assert_same(left: object, right: object) -> None:
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 63])
@pytest.mark.parametrize("zeroed", [0, 1, 4])
def test_batch_norm_has_the_values_and_gradients_of_the_original(length: int, zeroed: int) -> None:
    generator = torch.Generator().manual_seed(0)
    original = BatchNorm(3).double().train()
    with torch.no_grad():
        original.weight.uniform_(0.5, 2.0, generator=generator)
        original.bias.normal_(generator=generator)
    x = torch.randn(5, 3, length, generator=generator, dtype=torch.float64) * 3 + 7
    weight = torch.rand(5, generator=generator, dtype=torch.float64)
    weight[:zeroed] = 0
    twin = PlanBatchNorm.like(original)
    assert_same(values_and_gradients(twin, x, weight), values_and_gradients(original, x, weight))


def test_batch_norm_without_weights_weighs_all_windows_alike() -> None:
    x = torch.randn(4, 2, 9, dtype=torch.float64)
    layer = PlanBatchNorm(2).double().train()
    plain = layer(x)
    assert_same(plain, layer(x, torch.full((4,), 0.5, dtype=torch.float64)))


def test_batch_norm_gradient_is_the_numerical_one() -> None:
    layer = PlanBatchNorm(2).double().train()
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: layer(value, weight), (x,))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("length", [6, 7])
def test_max_pool_has_the_values_and_gradients_of_the_original(size: int, length: int) -> None:
    x = torch.randn(2, 3, length, dtype=torch.float64)
    assert_same(values_and_gradients(PlanMaxPool(size), x), values_and_gradients(MaxPool(size), x))


def test_dropout_draws_the_masks_of_the_original() -> None:
    x = torch.randn(7, 5, 3)
    for p in (0.1, 0.2, 1 / 3, 0.5, 0.75):
        for key in (0, 17, 2**31 - 1):
            rng = torch.tensor(key)
            torch.testing.assert_close(PlanDropout(p, 3)(x, rng), Dropout(p, 3)(x, rng), rtol=0, atol=0)


@pytest.mark.parametrize("backbone", ["cnn", "transformer"])
def test_a_model_with_plan_layers_has_the_same_tensors_and_leaves_the_original_alone(backbone: str) -> None:
    original = model(backbone)
    kinds = [type(module) for module in original.modules()]
    twin = with_plan_layers(original)
    assert [type(module) for module in original.modules()] == kinds
    assert list(twin.state_dict()) == list(original.state_dict())
    assert_same(dict(twin.state_dict()), dict(original.state_dict()))
    x = torch.randn(3, 3, 40)
    assert_same(twin.eval()(x), original.eval()(x))
