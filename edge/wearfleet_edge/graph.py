"""Look into an ONNX file without the onnx package: which operators, which initialisers, which metadata.

A device loads a graph only after this check: standard operators from an allow-list, no code of others (custom
domains, local functions), no control flow, no randomness of its own, no data outside the file.

Source:
    protobuf wire format, and field numbers of ``onnx.proto3``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from wearfleet_protos.errors import IntegrityError

from wearfleet_edge.operators import ALLOWED_OPERATORS, HIGHEST_OPSET

__all__ = ["GraphSummary", "inspect_graph"]

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
class GraphSummary:
    """What a graph consists of.

    Args:
        operators: names in use.
        initializers: dtype (NumPy name, or ``type <n>``) and shape of each named constant.
        metadata: ``metadata_props``.
    """

    operators: frozenset[str]
    initializers: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]


def inspect_graph(data: bytes) -> GraphSummary:
    """Check an ONNX file and summarise it.

    Args:
        data: the whole file.

    Raises:
        IntegrityError: not ONNX, or it uses something outside the allow-list; says what.
    """
    operators: set[str] = set()
    initializers: dict[str, tuple[str, tuple[int, ...]]] = {}
    metadata: dict[str, str] = {}
    graphs = 0
    for number, value in _fields(memoryview(data)):
        if number == 7:
            graphs += 1
            _read_graph(_chunk(value), operators, initializers)
        elif number == 8:
            _check_opset(_chunk(value))
        elif number == 14:
            key, text = _strings(_chunk(value), 1, 2)
            metadata[key] = text
        elif number == 20:
            raise IntegrityError("the graph carries training information, which is not run on devices")
        elif number == 25:
            raise IntegrityError("the graph defines functions of its own; export it with functions inlined")
    if graphs != 1:
        raise IntegrityError(f"expected an ONNX file with one graph, found {graphs}")
    return GraphSummary(frozenset(operators), initializers, metadata)


def _read_graph(
    data: memoryview, operators: set[str], initializers: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    for number, value in _fields(data):
        if number == 1:
            operators.add(_read_node(_chunk(value)))
        elif number == 5:
            name, dtype, shape = _read_tensor(_chunk(value))
            initializers[name] = dtype, shape
        elif number == 15:
            raise IntegrityError("the graph has sparse initialisers, which are not supported")


def _read_node(data: memoryview) -> str:
    """Operator of a node after checking it and its attributes."""
    operator, domain = _strings(data, 4, 7)
    if domain not in _STANDARD_DOMAINS:
        raise IntegrityError(f"operator {domain}::{operator} is not a standard ONNX operator; refused")
    if operator not in ALLOWED_OPERATORS:
        raise IntegrityError(f"operator {operator!r} is not on the allow-list; refused")
    for number, value in _fields(data):
        if number == 5:
            _check_attribute(_chunk(value), operator)
    return operator


def _check_attribute(data: memoryview, operator: str) -> None:
    for number, value in _fields(data):
        if number in (6, 11):
            raise IntegrityError(f"operator {operator} holds a graph inside; control flow is refused")
        if number in (5, 10):
            _read_tensor(_chunk(value))
        elif number in (22, 23):
            raise IntegrityError(f"operator {operator} holds a sparse tensor, which is not supported")


def _read_tensor(data: memoryview) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and shape of a tensor that must lie inside the file."""
    name, dtype, shape = "", "", []
    for number, value in _fields(data):
        if number == 1:
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2 and isinstance(value, int):
            dtype = _DTYPES.get(value, f"type {value}")
        elif number == 8:
            name = _text(value)
        elif number == 13 or (number == 14 and value != 0):
            raise IntegrityError("the graph keeps tensors outside its file; refused")
    return name, dtype, tuple(shape)


def _check_opset(data: memoryview) -> None:
    domain, version = "", 0
    for number, value in _fields(data):
        if number == 1:
            domain = _text(value)
        elif number == 2 and isinstance(value, int):
            version = value
    if domain in _STANDARD_DOMAINS and not 7 <= version <= HIGHEST_OPSET:
        raise IntegrityError(f"opset {version} is not supported; expected 7 to {HIGHEST_OPSET}")


def _strings(data: memoryview, first: int, second: int) -> tuple[str, str]:
    """Two string fields of a message, empty when absent."""
    found = {first: "", second: ""}
    for number, value in _fields(data):
        if number in found:
            found[number] = _text(value)
    return found[first], found[second]


def _chunk(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise IntegrityError("not an ONNX file: a number stands where a message belongs")
    return value


def _text(value: int | memoryview) -> str:
    try:
        return str(_chunk(value), "utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"not an ONNX file: a name is not text ({error})") from error


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of one protobuf message."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise IntegrityError(f"not an ONNX file: wire type {kind}")
        if at + size > end or number == 0:
            raise IntegrityError("not an ONNX file: it ends in the middle of a field")
        yield number, data[at : at + size]
        at += size


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise IntegrityError("not an ONNX file: it ends in the middle of a number")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
