"""Named tensors: roles, specifications, their hash, and safetensors bytes.

No code in wearfleet looks at a tensor's *name* to decide what it is: the role is declared in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal, NewType

import numpy as np

from wearfleet_protos.canonical import canonical_json
from wearfleet_protos.errors import IntegrityError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "MAX_TENSOR_BYTES",
    "NO_RANK_LIMIT",
    "Digest",
    "Origin",
    "TensorGroup",
    "TensorRole",
    "TensorSpec",
    "check_finite",
    "check_tensors",
    "constant_start",
    "decode_tensors",
    "digest_of",
    "encode_tensors",
    "parse_digest",
    "schema_hash",
    "tensor_metadata",
]

Digest = NewType("Digest", str)
"""Content address: ``sha256:`` and 64 lower-case hexadecimal digits."""

Origin = Literal["global", "local", "zeros", "ones", "copy"]

MAX_TENSOR_BYTES: Final = 512 * 1024 * 1024
"""Largest tensor file that is read, in bytes."""

NO_RANK_LIMIT: Final = sys.maxsize
"""A device's highest rank of low-rank factors when it has none: that of every network."""

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_WIRE_TYPES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "float16": "F16",
    "int32": "I32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
}
_WIRE_ORDER: Final = tuple(_WIRE_TYPES)
_NUMPY_TYPES: Final = {wire: name for name, wire in _WIRE_TYPES.items()}
_DTYPES: Final = frozenset(_WIRE_TYPES)
_ALIGNMENT: Final = 8
_MAX_HEADER_BYTES: Final = 16 * 1024 * 1024


class TensorRole(StrEnum):
    """What a tensor is to a federated algorithm; exactly one role a tensor.

    LORA_RANK says which of the R columns of LORA_B and rows of LORA_A a client uses: 1 for the first ones, 0 for those
    beyond the highest rank that the device allows.
    """

    SHARED = "SHARED"
    NORM_AFFINE = "NORM_AFFINE"
    NORM_STAT = "NORM_STAT"
    COUNTER = "COUNTER"
    HEAD = "HEAD"
    FROZEN = "FROZEN"
    LORA_A = "LORA_A"
    LORA_B = "LORA_B"
    LORA_RANK = "LORA_RANK"
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
            value (when there is none, the downloaded one, or the copy where ``copy_of`` is given), ``zeros``,
            ``ones``, or ``copy`` of ``copy_of``; LORA_RANK is (R,) with ``ones``, of which the device clears some.
        copy_of: name of the tensor copied at the start of a round; with origin ``copy``, and possible with ``local``.

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
        if (self.origin == "copy" and not self.copy_of) or (
            self.copy_of and self.origin not in ("copy", "local")
        ):
            raise ShapeError(
                f"tensor {self.name}: origin 'copy' needs copy_of, and 'global', 'zeros' and 'ones' have none"
            )
        if self.role == TensorRole.LORA_RANK and (len(self.shape), self.origin) != (1, "ones"):
            raise ShapeError(
                f"tensor {self.name}: role LORA_RANK needs one dimension and origin 'ones', got {self.shape} and "
                f"{self.origin!r}"
            )

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


def constant_start(spec: TensorSpec, max_lora_rank: int = NO_RANK_LIMIT) -> NDArray[np.generic]:
    """First value of a tensor with origin ``zeros`` or ``ones``.

    Args:
        spec: of the tensor.
        max_lora_rank: so many numbers of a tensor of role LORA_RANK stay 1, at least 1.
    """
    made: NDArray[np.generic] = np.full(spec.shape, float(spec.origin == "ones"), spec.dtype)
    if spec.role == TensorRole.LORA_RANK:
        made[max_lora_rank:] = 0
    return made


def encode_tensors(
    tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Safetensors bytes of named arrays; equal inputs give equal bytes. The values are copied once.

    Raises:
        ShapeError: an array has a type that no specification can have.

    Source: the safetensors format; larger types first, so that every tensor is aligned, then by name.
    """
    arrays = {name: np.ascontiguousarray(tensors[name]).reshape(tensors[name].shape) for name in tensors}
    for name, array in arrays.items():
        if str(array.dtype) not in _WIRE_TYPES:
            raise ShapeError(f"tensor {name}: dtype must be one of {sorted(_DTYPES)}, got {array.dtype}")
    order = sorted(arrays, key=lambda name: (-_WIRE_ORDER.index(str(arrays[name].dtype)), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in order:
        array = arrays[name]
        header[name] = {
            "dtype": _WIRE_TYPES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    values = [arrays[name].reshape(-1).view(np.uint8).data for name in order if arrays[name].size]
    return b"".join((len(text).to_bytes(8, "little"), text, *values))


def decode_tensors(
    data: bytes | bytearray | memoryview,
    specs: Iterable[TensorSpec] | None = None,
    max_bytes: int = MAX_TENSOR_BYTES,
) -> dict[str, NDArray[np.generic]]:
    """Named arrays from safetensors bytes, checked against ``specs`` when given.

    The arrays are views of ``data``: nothing is copied, and they can be written to only where ``data`` can.

    Raises:
        IntegrityError: too large, or not safetensors.
        ShapeError: a tensor is missing, unexpected, or has another dtype or shape than its specification.
    """
    if len(data) > max_bytes:
        raise IntegrityError(f"tensor file has {len(data)} bytes, at most {max_bytes} are accepted")
    header, begin = _read_header(data)
    header.pop("__metadata__", None)
    values = memoryview(data)[begin:]
    try:
        tensors = {name: _view(values, entry) for name, entry in header.items()}
        ends = sorted((entry["data_offsets"][0], entry["data_offsets"][1]) for entry in header.values())
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise IntegrityError(f"not a readable safetensors file ({error}); fetch it again") from error
    at = 0
    for first, last in ends:
        if first != at:
            raise IntegrityError(f"not a readable safetensors file (values at {first}, expected at {at})")
        at = last
    if at != len(values):
        raise IntegrityError(
            f"not a readable safetensors file ({len(values)} bytes of values, named are {at})"
        )
    if specs is not None:
        check_tensors(tensors, specs)
    return tensors


def tensor_metadata(data: bytes) -> dict[str, str]:
    """The string metadata of safetensors bytes (empty when there is none).

    Raises:
        IntegrityError: not safetensors.
    """
    found = _read_header(data)[0].get("__metadata__", {})
    if not isinstance(found, dict):
        raise IntegrityError("not a readable safetensors header (its metadata is no object)")
    return {str(k): str(v) for k, v in found.items()}


def _read_header(data: bytes | bytearray | memoryview) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where the values begin.

    Raises:
        IntegrityError: cut off, too large, or not a JSON object.
    """
    view = memoryview(data)
    begin = 8 + int.from_bytes(view[:8], "little")
    if len(view) < 8 or begin > min(len(view), _MAX_HEADER_BYTES):
        raise IntegrityError(f"not a readable safetensors file (a header of {begin} in {len(view)} bytes)")
    try:
        header = json.loads(bytes(view[8:begin]))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"not a readable safetensors header ({error})") from error
    if not isinstance(header, dict):
        raise IntegrityError("not a readable safetensors header (not an object)")
    return header, begin


def _view(values: memoryview, entry: Mapping[str, Any]) -> NDArray[np.generic]:
    """The array of one entry of a header; a copy only where the file does not align it."""
    dtype = np.dtype(_NUMPY_TYPES[entry["dtype"]])
    shape = tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if not all(type(size) is int and size >= 0 for size in (*shape, first, last)):
        raise ValueError(f"sizes must be non-negative integers, got {shape}, {first}, {last}")
    if last - first != math.prod(shape) * dtype.itemsize or last > len(values):
        raise ValueError(f"{entry['dtype']} {shape} cannot be the bytes {first} to {last} of {len(values)}")
    if dtype == np.bool_ and bool((np.frombuffer(values[first:last], np.uint8) > 1).any()):
        raise ValueError("a truth value must be 0 or 1")
    array = np.frombuffer(values[first:last], dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


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
