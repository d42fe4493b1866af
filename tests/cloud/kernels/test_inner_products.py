"""Inner products whose gradient is one product against those of autograd, single and stacked."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap
from wearfleet_cloud.kernels.inner_products import inner_products


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (33, 130)])
def test_value_and_gradient_are_those_of_the_product(shape: tuple[int, int]) -> None:
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(shape[0], shape[0], dtype=torch.float64)  # not symmetric
    expected = rows @ rows.T
    torch.testing.assert_close(inner_products(rows), expected, rtol=1e-12, atol=1e-12)
    (ours,) = torch.autograd.grad(inner_products(rows), rows, slope)
    (theirs,) = torch.autograd.grad(expected, rows, slope)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_stacked_gradients_are_single_ones() -> None:
    rows = torch.randn(4, 6, 3, dtype=torch.float64)

    def loss(one: torch.Tensor) -> torch.Tensor:
        return inner_products(one).pow(3).sum()

    stacked = vmap(grad(loss))(rows)
    for run in range(4):
        torch.testing.assert_close(stacked[run], grad(loss)(rows[run]), rtol=1e-12, atol=1e-12)
