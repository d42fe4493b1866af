"""The forms of the CORAL penalty on a processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from wearfleet_cloud.kernels.coral import (
    coral_penalty,
    coral_penalty_gram,
    coral_penalty_reference,
    coral_penalty_spread,
)
from wearfleet_protos.errors import ShapeError

_FORMS = [coral_penalty_reference, coral_penalty_gram, coral_penalty_spread]


def _features(domains: int, windows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(domains * 1000 + windows * 10 + width)
    z = torch.randn(domains, windows, width, generator=generator, dtype=dtype)
    return (
        z * (1.0 + torch.arange(domains, dtype=dtype))[:, None, None]
        + torch.arange(width, dtype=dtype) / width
    )


@pytest.mark.parametrize("form", _FORMS)
def test_penalty_is_that_of_the_definition(form) -> None:
    z = _features(3, 5, 4)
    expected = 0.0
    for a, b in ((0, 1), (0, 2), (1, 2)):
        one, other = z[a].numpy(), z[b].numpy()
        expected += np.mean((one.mean(0) - other.mean(0)) ** 2)
        expected += np.mean((np.cov(one.T) - np.cov(other.T)) ** 2)
    assert float(form(z)) == pytest.approx(expected / 3, rel=1e-12)


@pytest.mark.parametrize(
    ("domains", "windows", "width"), [(2, 2, 1), (2, 3, 7), (4, 32, 63), (3, 5, 1023), (6, 33, 16)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_all_forms_are_equal_forward_and_backward(
    domains: int, windows: int, width: int, weighted: bool
) -> None:
    z = _features(domains, windows, width).requires_grad_()
    weight = 0.5 + torch.rand(domains, windows, dtype=torch.float64) if weighted else None
    values = [form(z, weight) for form in _FORMS]
    grads = [torch.autograd.grad(value, z)[0] for value in values]
    for value, slope in zip(values[1:], grads[1:], strict=True):
        torch.testing.assert_close(value, values[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(slope, grads[0], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("form", _FORMS)
def test_gradient_is_right(form) -> None:
    weight = torch.tensor([[1.0, 1.0, 0.5, 2.0]] * 3, dtype=torch.float64)
    z = _features(3, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(form, (z,))
    assert torch.autograd.gradcheck(lambda z: form(z, weight), (z,))


@pytest.mark.parametrize("form", _FORMS)
def test_float32_is_close_to_float64_at_training_size(form) -> None:
    z = _features(4, 32, 832).relu()
    exact = float(coral_penalty_reference(z))
    # 1e-7 of rounding in every product, against terms of the size of the penalty
    assert float(form(z.float())) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("form", _FORMS)
def test_same_batch_in_every_domain_costs_nothing(form) -> None:
    z = _features(1, 32, 100, torch.float32).expand(3, 32, 100)
    scale = float(z.square().mean()) ** 2
    assert 0.0 <= float(form(z)) < 1e-6 * scale


@pytest.mark.parametrize("form", _FORMS)
def test_order_of_domains_and_of_windows_does_not_matter(form) -> None:
    z = _features(4, 6, 9)
    shuffled = z[torch.tensor([3, 1, 0, 2])][:, torch.tensor([5, 0, 4, 1, 3, 2])]
    torch.testing.assert_close(form(shuffled), form(z), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("form", _FORMS)
def test_a_window_of_weight_zero_is_absent(form) -> None:
    z = _features(3, 6, 8)
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]] * 3, dtype=torch.float64)
    torch.testing.assert_close(form(z, weight), form(z[:, :4]), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize(("windows", "width"), [(4, 9), (4, 8), (4, 3)])
def test_public_function_is_the_reference_whichever_form_it_takes(windows: int, width: int) -> None:
    z = _features(3, windows, width)
    torch.testing.assert_close(coral_penalty(z), coral_penalty_reference(z), rtol=1e-10, atol=0.0)


def test_one_domain_has_no_penalty() -> None:
    assert float(coral_penalty(_features(1, 4, 3))) == 0.0


@pytest.mark.parametrize(
    ("shape", "weight"), [((4, 3), None), ((2, 1, 3), None), ((2, 4, 3), (2, 3)), ((2, 4, 3), (8,))]
)
def test_wrong_shapes_are_refused(shape: tuple[int, ...], weight: tuple[int, ...] | None) -> None:
    with pytest.raises(ShapeError):
        coral_penalty(torch.zeros(shape), None if weight is None else torch.ones(weight))
