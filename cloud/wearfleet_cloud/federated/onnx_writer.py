"""A small writer of canonical ONNX graphs: the same calls give the same bytes.

Every node is pure, so an equal node is written once; values are numbered in the order in which they are made; there
is no documentation string, source location or producer version in the result.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["GraphWriter", "Value", "onnx_type"]

Value = str

_OPSET: Final = 18
_IR_VERSION: Final = 9
_TYPES: Final = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "uint64": TensorProto.UINT64,
    "bool": TensorProto.BOOL,
}


def onnx_type(dtype: str) -> int:
    """ONNX element type of a NumPy dtype name."""
    return _TYPES[dtype]


class GraphWriter:
    """Collects nodes and constants, then gives the bytes of a model."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self._made: dict[tuple[object, ...], tuple[Value, ...]] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._renamed: dict[Value, str] = {}

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> Value:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], list(shape)))
        return name

    def output(self, name: str, value: Value, dtype: str, shape: Sequence[int]) -> None:
        """Declare that graph output ``name`` is ``value``."""
        made_here = any(value in values for values in self._made.values())
        if made_here and value not in self._renamed:
            self._renamed[value] = name
        else:
            self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], list(shape)))

    def constant(self, array: NDArray[np.generic] | Sequence[int] | int, dtype: str = "int64") -> Value:
        """A constant tensor; equal constants are stored once."""
        values = np.ascontiguousarray(np.asarray(array, dtype=dtype)).reshape(np.shape(array))
        key = (dtype, values.shape, values.tobytes())
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(values, f"c{len(self._constants)}")
        return self._constants[key].name

    def node(self, operator: str, *inputs: Value, **attributes: Any) -> Value:
        """Append an operator with one output."""
        return self.nodes(operator, inputs, 1, **attributes)[0]

    def nodes(
        self, operator: str, inputs: Sequence[Value], outputs: int, **attributes: Any
    ) -> tuple[Value, ...]:
        """Append an operator with several outputs; an equal one made before is used again."""
        key = (operator, *inputs, outputs, *((name, repr(attributes[name])) for name in sorted(attributes)))
        if key not in self._made:
            first = sum(map(len, self._made.values()))
            names = tuple(f"v{first + i}" for i in range(outputs))
            self._nodes.append(helper.make_node(operator, list(inputs), list(names), **attributes))
            self._made[key] = names
        return self._made[key]

    def finish(self) -> bytes:
        """The serialised model, checked.

        Raises:
            onnx.checker.ValidationError: a node was used wrongly.
        """
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [self._renamed.get(name, name) for name in names]
        graph = helper.make_graph(
            self._nodes, "plan", self._inputs, self._outputs, list(self._constants.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
            producer_name="wearfleet",
        )
        onnx.checker.check_model(model)
        return model.SerializeToString(deterministic=True)
