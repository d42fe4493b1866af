"""Rewrite an exported graph so that it is lean, reproducible and tells nothing about the machine that wrote it.

The exporter's own optimiser stays off: it folds normalisation into convolutions and shares equal initialisers, and
then a device could no longer lay personal tensors over them. ONNX Runtime folds when it loads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["ancestors", "tidy"]

_PRODUCER: Final = "wearfleet"


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with constant batch-free reshapes, without dead nodes, notes of the exporter and inner shapes.

    The exporter computes the first size of each reshape at run time (five nodes a reshape); ``-1`` in the target
    shape means "what is left", which is the same and costs nothing.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    _constant_reshapes(result.graph)
    _drop_dead(result.graph)
    _drop_notes(result)
    result.producer_name = _PRODUCER
    result.ClearField("producer_version")
    return result


def ancestors(graph: onnx.GraphProto, outputs: Iterable[str]) -> set[str]:
    """Names of all values that ``outputs`` depend on, themselves included."""
    producer = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    waiting = list(outputs)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if name in producer:
            waiting.extend(producer[name].input)
    return found


def _constant_reshapes(graph: onnx.GraphProto) -> None:
    producer = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "Reshape":
            continue
        sizes = _trailing_sizes(producer.get(node.input[1]), producer)
        if sizes is None:
            continue
        shape = f"{node.output[0]}.shape"
        graph.initializer.append(numpy_helper.from_array(np.array([-1, *sizes], np.int64), shape))
        node.input[1] = shape
        del node.attribute[:]  # allowzero, which says nothing where no size is 0


def _trailing_sizes(concat: onnx.NodeProto | None, producer: dict[str, onnx.NodeProto]) -> list[int] | None:
    """All sizes but the first, where the first is computed and the others are positive constants; else None."""
    if concat is None or concat.op_type != "Concat" or len(concat.input) < 2:
        return None
    if _constant_ints(producer.get(concat.input[0])) is not None:
        return None
    sizes: list[int] = []
    for name in concat.input[1:]:
        values = _constant_ints(producer.get(name))
        if values is None or min(values, default=1) < 1:
            return None
        sizes.extend(values)
    return sizes


def _constant_ints(node: onnx.NodeProto | None) -> list[int] | None:
    """The values of an integer Constant node, else None."""
    if node is None or node.op_type != "Constant":
        return None
    attribute = node.attribute[0]
    if attribute.name == "value_ints":
        return [int(value) for value in attribute.ints]
    if attribute.name == "value" and attribute.t.data_type == onnx.TensorProto.INT64:
        return [int(value) for value in numpy_helper.to_array(attribute.t).ravel()]
    return None


def _drop_dead(graph: onnx.GraphProto) -> None:
    """Remove nodes and initialisers that no output depends on."""
    live = ancestors(graph, (output.name for output in graph.output))
    nodes = [node for node in graph.node if any(name in live for name in node.output)]
    initialisers = [tensor for tensor in graph.initializer if tensor.name in live]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initialisers)


def _drop_notes(model: onnx.ModelProto) -> None:
    """Remove stack traces, file paths and other notes of the exporter."""
    model.ClearField("doc_string")
    del model.metadata_props[:], model.functions[:]
    graph = model.graph
    graph.ClearField("doc_string")
    del graph.metadata_props[:]
    graph.name = "model"
    for node in graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.ClearField("doc_string")
        del value.metadata_props[:]
    for tensor in graph.initializer:
        tensor.ClearField("doc_string")
        del tensor.metadata_props[:]
