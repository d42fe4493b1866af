"""Named tensors: roles, specifications, their hash, and safetensors bytes.

No code in wearfleet looks at a tensor's *name* to decide what it is: the role is declared in the manifest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal, NewType

import numpy as np

from wearfleet_protos.canonical import canonical_json
from wearfleet_protos.errors import IntegrityError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "MAX_TENSOR_BYTES",
    "Digest",
    "Origin",
    "TensorGroup",
    "TensorRole",
    "TensorSpec",
    "check_finite",
    "check_tensors",
    "decode_tensors",
    "digest_of",
    "encode_tensors",
    "parse_digest",
    "schema_hash",
    "tensor_metadata",
]

Digest = NewType("Digest", str)
"""Content address: ``sha256:`` and 64 lower-case hexadecimal digits."""

Origin = Literal["global", "local", "zeros", "copy"]

MAX_TENSOR_BYTES: Final = 512 * 1024 * 1024
"""Largest tensor file that is read, in bytes."""

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_DTYPES: Final = frozenset({"float32", "float64", "float16", "int64", "int32", "uint8", "bool"})


class TensorRole(StrEnum):
    """What a tensor is to a federated algorithm; exactly one role a tensor."""

    SHARED = "SHARED"
    NORM_AFFINE = "NORM_AFFINE"
    NORM_STAT = "NORM_STAT"
    COUNTER = "COUNTER"
    HEAD = "HEAD"
    FROZEN = "FROZEN"
    LORA_A = "LORA_A"
    LORA_B = "LORA_B"
    CLIENT_EMB = "CLIENT_EMB"
    AUX = "AUX"


class TensorGroup(StrEnum):
    """Which part of the training state a tensor belongs to."""

    PARAM = "param"
    BUFFER = "buffer"
    OPTIMISER = "optimiser"
    ANCHOR = "anchor"
    TEACHER = "teacher"
    AUX = "aux"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, type and meaning of one tensor.

    Args:
        name: unique within its document.
        dtype: NumPy name, for example ``float32``.
        shape: all dimensions known.
        role: what an algorithm may do with it.
        group: which part of the training state it is.
        origin: where a round gets its first value: ``global`` downloaded, ``local`` the device's persisted
            value (the downloaded one when there is none), ``zeros``, or ``copy`` of ``copy_of``.
        copy_of: name of the tensor copied at the start of a round; only with origin ``copy``.

    Raises:
        ShapeError: a field is out of its range.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: TensorRole
    group: TensorGroup
    origin: Origin = "global"
    copy_of: str = ""

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 256:
            raise ShapeError(f"tensor name must have 1 to 256 characters, got {self.name!r}")
        if self.dtype not in _DTYPES:
            raise ShapeError(
                f"tensor {self.name}: dtype must be one of {sorted(_DTYPES)}, got {self.dtype!r}"
            )
        if any(size < 0 for size in self.shape):
            raise ShapeError(f"tensor {self.name}: negative size in shape {self.shape}")
        if (self.origin == "copy") != bool(self.copy_of):
            raise ShapeError(f"tensor {self.name}: origin 'copy' and copy_of go together")

    @property
    def size_bytes(self) -> int:
        """Bytes of the raw values."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, object]:
        """The JSON object of a canonical document."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "role": str(self.role),
            "group": str(self.group),
            "origin": self.origin,
            "copy_of": self.copy_of,
        }


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """SHA-256 content address of some bytes."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def parse_digest(text: str) -> Digest:
    """Check the form of a content address that came from outside.

    Raises:
        IntegrityError: not ``sha256:`` and 64 hexadecimal digits.
    """
    if not _DIGEST.fullmatch(text):
        raise IntegrityError(f"expected a digest like sha256:<64 hex digits>, got {text[:80]!r}")
    return Digest(text)


def schema_hash(specs: Iterable[TensorSpec]) -> Digest:
    """Hash of names, dtypes, shapes and roles in name order; equal hashes can be averaged with each other."""
    rows = [
        [s.name, s.dtype, list(s.shape), str(s.role)]
        for s in sorted(specs, key=lambda s: s.name)
        if s.group in (TensorGroup.PARAM, TensorGroup.BUFFER)
    ]
    return digest_of(canonical_json(rows))


def encode_tensors(
    tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Safetensors bytes of named arrays; equal inputs give equal bytes."""
    from safetensors.numpy import save  # noqa: PLC0415  the device imports it only when it trains

    arrays = {
        name: np.ascontiguousarray(tensors[name]).reshape(tensors[name].shape) for name in sorted(tensors)
    }
    return save(arrays, dict(sorted(metadata.items())) if metadata else None)


def decode_tensors(
    data: bytes, specs: Iterable[TensorSpec] | None = None, max_bytes: int = MAX_TENSOR_BYTES
) -> dict[str, NDArray[np.generic]]:
    """Named arrays from safetensors bytes, checked against ``specs`` when given.

    Raises:
        IntegrityError: too large, or not safetensors.
        ShapeError: a tensor is missing, unexpected, or has another dtype or shape than its specification.
    """
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.numpy import load  # noqa: PLC0415

    if len(data) > max_bytes:
        raise IntegrityError(f"tensor file has {len(data)} bytes, at most {max_bytes} are accepted")
    try:
        tensors: dict[str, NDArray[np.generic]] = load(data)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise IntegrityError(f"not a readable safetensors file ({error}); fetch it again") from error
    if specs is not None:
        check_tensors(tensors, specs)
    return tensors


def tensor_metadata(data: bytes) -> dict[str, str]:
    """The string metadata of safetensors bytes (empty when there is none).

    Raises:
        IntegrityError: not safetensors.
    """
    import json  # noqa: PLC0415

    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        return {str(k): str(v) for k, v in header.get("__metadata__", {}).items()}
    except (ValueError, AttributeError) as error:
        raise IntegrityError(f"not a readable safetensors header ({error})") from error


def check_tensors(tensors: Mapping[str, NDArray[np.generic]], specs: Iterable[TensorSpec]) -> None:
    """Check that ``tensors`` are exactly those of ``specs``.

    Raises:
        ShapeError: says which tensor differs and how.
    """
    wanted = {s.name: s for s in specs}
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise ShapeError(f"tensor set differs: missing {missing[:5]}, unexpected {extra[:5]}")
    for name, spec in wanted.items():
        array = tensors[name]
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise ShapeError(
                f"tensor {name}: expected {spec.dtype} {spec.shape}, got {array.dtype} {array.shape}"
            )


def check_finite(tensors: Mapping[str, NDArray[np.generic]]) -> None:
    """Refuse NaN and infinities.

    Raises:
        ShapeError: names the first tensor with a value that is not finite.
    """
    for name in sorted(tensors):
        array = tensors[name]
        if np.issubdtype(array.dtype, np.floating) and not bool(np.isfinite(array).all()):
            raise ShapeError(f"tensor {name} holds NaN or infinity; refused")
