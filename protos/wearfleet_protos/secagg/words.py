"""A masked input as the bytes of an update: one tensor, whose words the format holds as signed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, encode_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["encode_words", "words_of", "words_spec"]

_NAME = "masked"


def words_spec(size: int) -> TensorSpec:
    """What a masked update of P numbers holds: P + 1 words."""
    return TensorSpec(_NAME, "int32", (size + 1,), TensorRole.AUX, TensorGroup.AUX)


def encode_words(words: NDArray[np.uint32]) -> bytes:
    """Safetensors bytes of (P + 1,) uint32."""
    return encode_tensors({_NAME: words.view(np.int32)})


def words_of(tensors: Mapping[str, NDArray[np.generic]]) -> NDArray[np.uint32]:
    """(P + 1,) uint32 of a decoded masked update."""
    return np.ascontiguousarray(tensors[_NAME]).view(np.uint32)
