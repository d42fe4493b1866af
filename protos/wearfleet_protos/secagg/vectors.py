"""An update as one vector of numbers, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from wearfleet_protos.errors import ShapeError
from wearfleet_protos.tensors import TensorRole, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["flat", "size_of", "tensors_of"]


def size_of(specs: Sequence[TensorSpec]) -> int:
    """P: how many numbers an update has; counters are none of them."""
    return sum(int(np.prod(spec.shape)) for spec in _summed(specs))


def flat(specs: Sequence[TensorSpec], update: Mapping[str, NDArray[np.generic]]) -> NDArray[np.float64]:
    """(P,) the numbers of an update in the order of ``specs``, without counters.

    Raises:
        ShapeError: a tensor is missing or has another shape.
    """
    parts = []
    for spec in _summed(specs):
        array = update.get(spec.name)
        if array is None or array.shape != spec.shape:
            raise ShapeError(f"update lacks tensor {spec.name} of shape {spec.shape}")
        parts.append(np.asarray(array, np.float64).reshape(-1))
    return np.concatenate(parts) if parts else np.zeros(0)


def tensors_of(specs: Sequence[TensorSpec], vector: NDArray[np.float64]) -> dict[str, NDArray[np.generic]]:
    """Inverse of :func:`flat`, in the types of ``specs``; counters are 0: a sum cannot tell the largest one.

    Raises:
        ShapeError: the vector has another size.
    """
    if vector.shape != (size_of(specs),):
        raise ShapeError(f"a vector of {size_of(specs)} numbers was expected, got {vector.shape}")
    tensors, at = dict[str, "NDArray[np.generic]"](), 0
    for spec in specs:
        if spec.role == TensorRole.COUNTER:
            tensors[spec.name] = np.zeros(spec.shape, spec.dtype)
            continue
        end = at + int(np.prod(spec.shape))
        tensors[spec.name] = vector[at:end].reshape(spec.shape).astype(spec.dtype)
        at = end
    return tensors


def _summed(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(spec for spec in specs if spec.role != TensorRole.COUNTER)
