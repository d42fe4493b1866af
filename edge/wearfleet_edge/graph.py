"""Look into an ONNX file without the onnx package, and lay other values over its constants in memory.

A device loads a graph only after this check: standard operators from an allow-list, no code of others (custom
domains, local functions), no control flow, no randomness of its own, no data outside the file.

Source:
    protobuf wire format, and field numbers of ``onnx.proto3``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from wearfleet_protos.errors import IntegrityError, ModelContractError

from wearfleet_edge.operators import ALLOWED_OPERATORS, HIGHEST_OPSET

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["GraphSummary", "Initializer", "inspect_graph", "overlay_tensors"]

_STANDARD_DOMAINS: Final = frozenset({"", "ai.onnx"})
_DTYPES: Final = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Initializer:
    """A named constant: dtype (NumPy name, or ``type <n>``), shape, and where its raw bytes lie in the file.

    ``raw`` is None when the values are stored in another way.
    """

    dtype: str
    shape: tuple[int, ...]
    raw: slice | None


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """What a graph consists of: operators in use, named constants, ``metadata_props``."""

    operators: frozenset[str]
    initializers: dict[str, Initializer]
    metadata: dict[str, str]


def inspect_graph(data: bytes) -> GraphSummary:
    """Check an ONNX file and summarise it.

    Args:
        data: the whole file.

    Raises:
        IntegrityError: not ONNX, or it uses something outside the allow-list; says what.
    """
    reader = _Reader(data)
    operators: set[str] = set()
    initializers: dict[str, Initializer] = {}
    metadata: dict[str, str] = {}
    graphs = 0
    for number, value in reader.fields(slice(0, len(data))):
        if number == 7:
            graphs += 1
            reader.read_graph(_span(value), operators, initializers)
        elif number == 8:
            reader.check_opset(_span(value))
        elif number == 14:
            key, text = reader.strings(_span(value), 1, 2)
            metadata[key] = text
        elif number == 20:
            raise IntegrityError("the graph carries training information, which is not run on devices")
        elif number == 25:
            raise IntegrityError("the graph defines functions of its own; export it with functions inlined")
    if graphs != 1:
        raise IntegrityError(f"expected an ONNX file with one graph, found {graphs}")
    return GraphSummary(frozenset(operators), initializers, metadata)


def overlay_tensors(
    data: bytes, summary: GraphSummary, tensors: Mapping[str, NDArray[np.generic]]
) -> bytearray:
    """A copy of an ONNX file in memory in which some named constants have other values.

    The file itself, which is signed, stays as it is. (``SessionOptions.add_initializer`` would come too late:
    ONNX Runtime fuses and folds constants with their old values before it looks at the new ones.)

    Args:
        data: the whole file.
        summary: of the same file.
        tensors: new values by name; dtype and shape as in the file.

    Raises:
        ModelContractError: a name, dtype or shape differs.
    """
    patched = bytearray(data)
    for name, array in tensors.items():
        found = summary.initializers.get(name)
        if found is None or (found.dtype, found.shape) != (str(array.dtype), array.shape):
            raise ModelContractError(f"tensor {name} is {array.dtype} {array.shape}, the graph has {found}")
        raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
        if found.raw is None or found.raw.stop - found.raw.start != len(raw):
            raise ModelContractError(
                f"tensor {name} is not stored as raw bytes in the graph; export it again"
            )
        patched[found.raw] = raw
    return patched


class _Reader:
    """Walks protobuf messages inside one file; a message is a slice of it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_graph(self, span: slice, operators: set[str], initializers: dict[str, Initializer]) -> None:
        """Check all nodes and list all constants."""
        for number, value in self.fields(span):
            if number == 1:
                operators.add(self._read_node(_span(value)))
            elif number == 5:
                name, tensor = self._read_tensor(_span(value))
                initializers[name] = tensor
            elif number == 15:
                raise IntegrityError("the graph has sparse initialisers, which are not supported")

    def check_opset(self, span: slice) -> None:
        """Refuse versions of the standard operators that we do not know."""
        domain, version = "", 0
        for number, value in self.fields(span):
            if number == 1:
                domain = self._text(value)
            elif number == 2 and isinstance(value, int):
                version = value
        if domain in _STANDARD_DOMAINS and not 7 <= version <= HIGHEST_OPSET:
            raise IntegrityError(f"opset {version} is not supported; expected 7 to {HIGHEST_OPSET}")

    def strings(self, span: slice, first: int, second: int) -> tuple[str, str]:
        """Two string fields of a message, empty when absent."""
        found = {first: "", second: ""}
        for number, value in self.fields(span):
            if number in found:
                found[number] = self._text(value)
        return found[first], found[second]

    def fields(self, span: slice) -> Iterator[tuple[int, int | slice]]:
        """Field numbers and values of one message; bytes are given as their place."""
        at, end = span.start, span.stop
        while at < end:
            key, at = self._varint(at, end)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                value, at = self._varint(at, end)
                yield number, value
                continue
            if kind == _BYTES:
                size, at = self._varint(at, end)
            elif kind in (_FIXED64, _FIXED32):
                size = 8 if kind == _FIXED64 else 4
            else:
                raise IntegrityError(f"not an ONNX file: wire type {kind}")
            if at + size > end or number == 0:
                raise IntegrityError("not an ONNX file: it ends in the middle of a field")
            yield number, slice(at, at + size)
            at += size

    def _read_node(self, span: slice) -> str:
        """Operator of a node after checking it and its attributes."""
        operator, domain = self.strings(span, 4, 7)
        if domain not in _STANDARD_DOMAINS:
            raise IntegrityError(f"operator {domain}::{operator} is not a standard ONNX operator; refused")
        if operator not in ALLOWED_OPERATORS:
            raise IntegrityError(f"operator {operator!r} is not on the allow-list; refused")
        for number, value in self.fields(span):
            if number == 5:
                self._check_attribute(_span(value), operator)
        return operator

    def _check_attribute(self, span: slice, operator: str) -> None:
        for number, value in self.fields(span):
            if number in (6, 11):
                raise IntegrityError(f"operator {operator} holds a graph inside; control flow is refused")
            if number in (5, 10):
                self._read_tensor(_span(value))
            elif number in (22, 23):
                raise IntegrityError(f"operator {operator} holds a sparse tensor, which is not supported")

    def _read_tensor(self, span: slice) -> tuple[str, Initializer]:
        """Name and description of a tensor that must lie inside the file."""
        name, dtype, raw = "", "", None
        shape: list[int] = []
        for number, value in self.fields(span):
            if number == 1:
                shape += [value] if isinstance(value, int) else self._packed(value)
            elif number == 2 and isinstance(value, int):
                dtype = _DTYPES.get(value, f"type {value}")
            elif number == 8:
                name = self._text(value)
            elif number == 9:
                raw = _span(value)
            elif number == 13 or (number == 14 and value != 0):
                raise IntegrityError("the graph keeps tensors outside its file; refused")
        return name, Initializer(dtype, tuple(shape), raw)

    def _packed(self, span: slice) -> list[int]:
        values, at = [], span.start
        while at < span.stop:
            value, at = self._varint(at, span.stop)
            values.append(value)
        return values

    def _text(self, value: int | slice) -> str:
        try:
            return self._data[_span(value)].decode()
        except UnicodeDecodeError as error:
            raise IntegrityError(f"not an ONNX file: a name is not text ({error})") from error

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= end or shift > 63:
                raise IntegrityError("not an ONNX file: it ends in the middle of a number")
            byte = self._data[at]
            value |= (byte & 0x7F) << shift
            at += 1
            if byte < 0x80:
                return value, at
            shift += 7


def _span(value: int | slice) -> slice:
    if isinstance(value, int):
        raise IntegrityError("not an ONNX file: a number stands where a message belongs")
    return value
