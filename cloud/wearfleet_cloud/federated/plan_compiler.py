"""From a pure step to the bytes of an ordinary ONNX graph.

A step is a function of named tensors. It is traced to ATen operators (``make_fx``; the gradient inside is traced
too), rewritten (``decompositions``, ``integer_ranges``) and written as ONNX opset 18 (``onnx_operators``,
``onnx_writer``). Compiling the same step twice gives the same bytes and the same digest. The graph holds operators of
the standard domain only, and runs with the stock ``onnxruntime`` wheel.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import onnx
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import Digest, digest_of

from wearfleet_cloud.federated.decompositions import decompositions
from wearfleet_cloud.federated.integer_ranges import shift_divisions
from wearfleet_cloud.federated.onnx_operators import Lowering, dtype_name
from wearfleet_cloud.federated.onnx_writer import GraphWriter

__all__ = ["OUTPUT_PREFIX", "CompiledGraph", "Step", "compile_graph", "operators_of"]

OUTPUT_PREFIX: Final = "out/"
"""Graph outputs carry it before the name of the result, because a state tensor is both input and output."""

Step = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""A pure function from named tensors to named results."""

_INPUT_RANGES: Final = {"rng": (0, 2**31 - 1)}  # wearfleet_protos.plan.rng_key


@dataclass(frozen=True, slots=True)
class CompiledGraph:
    """An ONNX graph and how to feed it.

    Args:
        data: serialised ModelProto.
        digest: content address of ``data``.
        inputs: names of the inputs that the graph needs, in its order.
        outputs: names of the results, in its order; the graph's output is ``OUTPUT_PREFIX`` and the name.
    """

    data: bytes
    digest: Digest
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def compile_graph(step: Step, example: Mapping[str, Tensor]) -> CompiledGraph:
    """Compile a pure function of named tensors.

    Args:
        step: from named tensors to named results; no hidden state, no control flow on values.
        example: one tensor for each input, of the shapes and types the graph will always get.

    Returns:
        The graph; inputs that do not influence a result are left out.

    Raises:
        ConfigError: an operator has no standard ONNX form, or a result is an unchanged input.
    """
    module, outputs = _trace(step, example)
    placeholders = dict(zip(example, (n for n in module.graph.nodes if n.op == "placeholder"), strict=True))
    shift_divisions(
        module, {placeholders[name]: _INPUT_RANGES[name] for name in example.keys() & _INPUT_RANGES}
    )
    used = {name: node for name, node in placeholders.items() if node.users}
    data = _write(module, used, outputs)
    return CompiledGraph(data, digest_of(data), tuple(used), outputs)


def operators_of(data: bytes) -> dict[str, int]:
    """How often each operator occurs in a graph, by name.

    Raises:
        ConfigError: an operator is not from the standard domain.
    """
    counts: dict[str, int] = {}
    for node in onnx.load_model_from_string(data).graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ConfigError(f"operator {node.domain}::{node.op_type} is not a standard ONNX operator")
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def _trace(step: Step, example: Mapping[str, Tensor]) -> tuple[GraphModule, tuple[str, ...]]:
    names: list[str] = []

    def positional(*tensors: Tensor) -> list[Tensor]:
        results = step(dict(zip(example, tensors, strict=True)))
        names[:] = results
        for name, result in results.items():
            if any(result is tensor for tensor in tensors):
                raise ConfigError(f"result {name!r} of a plan's step is an unchanged input; leave it out")
        return list(results.values())

    traced = make_fx(  # tensors that a step holds itself become constants of the graph
        positional, decomposition_table=decompositions(), tracing_mode="fake", _allow_non_fake_inputs=True
    )
    module = traced(*example.values())
    module.graph.eliminate_dead_code()
    return module, tuple(names)


def _write(module: GraphModule, inputs: Mapping[str, Node], outputs: tuple[str, ...]) -> bytes:
    writer = GraphWriter()
    lowering = Lowering(writer)
    for name, node in inputs.items():
        value = node.meta["val"]
        lowering.values[node] = writer.input(name, dtype_name(value.dtype), value.shape)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensor: Tensor = operator.attrgetter(node.target)(module)
            lowering.values[node] = writer.constant(tensor.numpy(), dtype_name(tensor.dtype))
        elif node.op == "call_function":
            lowering.lower(node)
    results: Any = module.graph.output_node().args[0]
    for name, result in zip(outputs, results, strict=True):
        value = result.meta["val"]
        writer.output(OUTPUT_PREFIX + name, lowering.values[result], dtype_name(value.dtype), value.shape)
    return writer.finish()
