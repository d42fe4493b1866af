"""Inner products of all rows with each other, whose gradient is one product of matrices, where autograd makes two."""

from torch import Tensor

from wearfleet_cloud.kernels.operation import operation

__all__ = ["inner_products"]


def inner_products(rows: Tensor) -> Tensor:
    """(N, N) of rows (N, F); works under ``torch.func.grad`` and ``vmap``, once differentiable.

    With P = Z Z^T and the gradient G of P: the gradient of Z is (G + G^T) Z.
    """
    (products,) = _products(None, rows[None])
    return products[0]


def _forward(_settings: object, rows: Tensor) -> tuple[Tensor, ...]:
    return (rows @ rows.mT,)


def _backward(
    _settings: object, _needs: tuple[bool, ...], rows: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    return ((gradient + gradient.mT) @ rows,)


_products = operation(_forward, _backward, values=1, differentiable=1)
