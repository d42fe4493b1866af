"""ATen operators of a traced step as ONNX operators: one small function each.

Shapes and types are fixed, so each function reads them from the traced node and writes plain operators of the
standard domain. An operator that is not in the table is refused by name; adding one is adding a function.
"""
# ruff: noqa: ARG001, ARG005 - one signature for all rules

import operator
from collections.abc import Callable
from typing import Any, Final, cast

import numpy as np
import torch
from torch.fx import Node
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.federated.onnx_writer import GraphWriter, Value, onnx_type

__all__ = ["Lowering", "dtype_name"]

_ATEN: Final = torch.ops.aten
_LARGE: Final = 1024
"""Elements above which an operator's own time outweighs the fixed cost of a node."""


def dtype_name(dtype: torch.dtype) -> str:
    """NumPy name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


class Lowering:
    """Writes the nodes of one traced graph, in order."""

    def __init__(self, writer: GraphWriter) -> None:
        self.writer = writer
        self.values: dict[Node, Any] = {}
        self._reshaped: dict[Value, tuple[Value, tuple[int, ...]]] = {}

    def lower(self, node: Node) -> None:
        """Write one ``call_function`` node.

        Raises:
            ConfigError: the operator has no ONNX form here.
        """
        if node.target is operator.getitem:
            owner, index = cast("tuple[Node, int]", node.args)
            self.values[node] = self.values[owner][index]
            return
        rule = _TABLE.get(getattr(node.target, "overloadpacket", None))
        if rule is None:
            raise ConfigError(
                f"operator {node.target} of a plan's step has no ONNX form; add one to onnx_operators.py or write the "
                "step with other operators"
            )
        self.values[node] = rule(self, node, tuple(node.args))

    def tensor(self, argument: object, dtype: str | None = None) -> Value:
        """The value of an argument: a traced tensor, or a number as a constant; converted to ``dtype`` if given."""
        if argument is None:
            raise ConfigError(
                "an operator of a plan's step lacks an optional tensor that its ONNX form needs"
            )
        if not isinstance(argument, Node):
            return self.writer.constant(np.asarray(argument, dtype=dtype), dtype or "float32")
        value = cast("Value", self.values[argument])
        if dtype is None or dtype == dtype_of(argument):
            return value
        return self.writer.node("Cast", value, to=onnx_type(dtype))

    def reshape(self, value: Value, old: tuple[int, ...], new: tuple[int, ...]) -> Value:
        """The value in another shape; a chain of reshapes becomes one, or none when it ends where it began."""
        source, shape = self._reshaped.get(value, (value, old))
        if shape == new:
            return source
        result = self.writer.node("Reshape", source, self.writer.constant(list(new)))
        self._reshaped[result] = (source, shape)
        return result

    def emit(self, name: str, node: Node, *arguments: object, **attributes: Any) -> Value:
        """An operator on arguments converted to the type of the node's result."""
        dtype = dtype_of(node)
        return self.writer.node(name, *(self.tensor(a, dtype) for a in arguments), **attributes)


Args = tuple[Any, ...]
"""Positional arguments of a traced operator; what they are, its schema says."""

Rule = Callable[[Lowering, Node, Args], Any]


def shape_of(node: object) -> tuple[int, ...]:
    """Shape of a traced tensor; () for a number."""
    return tuple(node.meta["val"].shape) if isinstance(node, Node) else ()


def dtype_of(node: Node) -> str:
    """NumPy name of the type of a traced tensor."""
    return dtype_name(node.meta["val"].dtype)


def _axes(args: Args) -> list[int]:
    """Axes of a reduction as non-negative numbers; all of them when none are named."""
    rank = len(shape_of(args[0]))
    named = args[1] if len(args) > 1 else None
    if named is None or named == []:
        return list(range(rank))
    return sorted(a % rank for a in (named if isinstance(named, list | tuple) else [named]))


def _elementwise(name: str) -> Rule:
    return lambda lo, node, args: lo.emit(name, node, *args)


def _bitwise(name: str) -> Rule:
    """ONNX has an operator for integers, and one without the prefix for truth values."""

    def rule(lo: Lowering, node: Node, args: Args) -> Value:
        logical = node.meta["val"].dtype == torch.bool
        return lo.emit(name if logical else f"Bitwise{name}", node, *args)

    return rule


def _scaled(name: str) -> Rule:
    """Addition or subtraction; ``alpha`` is refused because no step of ours uses it."""

    def rule(lo: Lowering, node: Node, args: Args) -> Value:
        if node.kwargs.get("alpha", 1) != 1:
            raise ConfigError(f"{node.target} with alpha has no ONNX form in a plan")
        return lo.emit(name, node, *args[:2])

    return rule


def _compare(name: str) -> Rule:
    def rule(lo: Lowering, node: Node, args: Args) -> Value:
        left, right = args[:2]
        dtype = dtype_name(
            torch.result_type(*(a.meta["val"] if isinstance(a, Node) else a for a in (left, right)))
        )
        return lo.writer.node(name, lo.tensor(left, dtype), lo.tensor(right, dtype))

    return rule


def _reduce(name: str) -> Rule:
    def rule(lo: Lowering, node: Node, args: Args) -> Value:
        keep = bool(args[2]) if len(args) > 2 else bool(node.kwargs.get("keepdim", False))
        axes = _axes(args)
        if not axes:
            return lo.tensor(args[0], dtype_of(node))
        return lo.writer.node(
            name, lo.tensor(args[0], dtype_of(node)), lo.writer.constant(axes), keepdims=int(keep)
        )

    return rule


def _reshape(lo: Lowering, node: Node, args: Args) -> Value:
    source = args[0]
    return lo.reshape(lo.tensor(source), shape_of(source), shape_of(node))


def _same(lo: Lowering, node: Node, args: Args) -> Value:
    return lo.tensor(args[0], dtype_of(node))


def _permute(lo: Lowering, node: Node, args: Args) -> Value:
    rank = len(shape_of(node))
    order = [a % rank for a in args[1]]
    return lo.writer.node("Transpose", lo.tensor(args[0]), perm=order)


def _expand(lo: Lowering, node: Node, args: Args) -> Value:
    if shape_of(args[0]) == shape_of(node):
        return lo.tensor(args[0])
    return lo.writer.node("Expand", lo.tensor(args[0]), lo.writer.constant(list(shape_of(node))))


def _filled(lo: Lowering, node: Node, args: Args) -> Value:
    """full, full_like, scalar_tensor: a constant, written out only when small."""
    number = args[0] if node.target is _ATEN.scalar_tensor.default else args[1]
    shape, dtype = shape_of(node), dtype_of(node)
    value = np.full((1,), number, dtype=dtype)
    if int(np.prod(shape)) <= _LARGE:
        return lo.writer.constant(np.broadcast_to(value.reshape(()), shape), dtype)
    return lo.writer.node("Expand", lo.writer.constant(value, dtype), lo.writer.constant(list(shape)))


def _arange(lo: Lowering, node: Node, args: Args) -> Value:
    numbers = [0, *args] if len(args) == 1 else list(args)
    start, end, step = (*numbers, 1) if len(numbers) == 2 else tuple(numbers)
    dtype = dtype_of(node)
    return lo.writer.node(
        "Range", *(lo.writer.constant(np.asarray(n, dtype), dtype) for n in (start, end, step))
    )


def _slice(lo: Lowering, node: Node, args: Args) -> Value:
    arguments = [*args, *(None,) * 5]
    axis, start, end, step = (arguments[1] or 0, arguments[2] or 0, arguments[3], arguments[4] or 1)
    size = shape_of(args[0])[axis]
    stop = size if end is None else min(end, size)
    return lo.writer.node(
        "Slice", lo.tensor(args[0]), *(lo.writer.constant([n]) for n in (start, stop, axis, step))
    )


def _slice_scatter(lo: Lowering, node: Node, args: Args) -> Value:
    """The tensor with a stretch replaced; the gradient of a slice is made of it."""
    given: list[Any] = [*args, *(None,) * (6 - len(args))]
    target, source, axis, start, end, step = given
    if step not in (None, 1):
        raise ConfigError("a plan's step may write stretches of a tensor only with step 1")
    axis = (axis or 0) % len(shape_of(target))
    size = shape_of(target)[axis]
    begin, stop = start or 0, size if end is None else min(end, size)
    value, parts = lo.tensor(target), [lo.tensor(source, dtype_of(node))]
    if begin > 0:
        parts.insert(0, _stretch(lo, value, axis, 0, begin))
    if stop < size:
        parts.append(_stretch(lo, value, axis, stop, size))
    return parts[0] if len(parts) == 1 else lo.writer.node("Concat", *parts, axis=axis)


def _stretch(lo: Lowering, value: Value, axis: int, start: int, stop: int) -> Value:
    return lo.writer.node("Slice", value, *(lo.writer.constant([n]) for n in (start, stop, axis)))


def _select(lo: Lowering, node: Node, args: Args) -> Value:
    source, axis, index = args
    axis %= len(shape_of(source))
    index %= shape_of(source)[axis]
    part = _stretch(lo, lo.tensor(source), axis, index, index + 1)
    kept = list(shape_of(source))
    kept[axis] = 1
    return lo.reshape(part, tuple(kept), shape_of(node))


def _split(lo: Lowering, node: Node, args: Args) -> tuple[Value, ...]:
    source, sizes, axis = (*args, 0)[:3]
    if len(sizes) == 1:
        return (lo.tensor(source),)
    return lo.writer.nodes(
        "Split",
        [lo.tensor(source), lo.writer.constant(list(sizes))],
        len(sizes),
        axis=axis % len(shape_of(source)),
    )


def _concat(lo: Lowering, node: Node, args: Args) -> Value:
    parts, axis = (*args, 0)[:2]
    if len(parts) == 1:
        return lo.tensor(parts[0])
    return lo.emit("Concat", node, *parts, axis=axis % len(shape_of(node)))


def _clamp(lo: Lowering, node: Node, args: Args) -> Value:
    low, high = (*args[1:], *(None,) * 2)[:2]
    value = lo.tensor(args[0], dtype_of(node))
    if low is not None:
        value = lo.writer.node("Max", value, lo.tensor(low, dtype_of(node)))
    return value if high is None else lo.writer.node("Min", value, lo.tensor(high, dtype_of(node)))


def _rsqrt(lo: Lowering, node: Node, args: Args) -> Value:
    return lo.writer.node("Reciprocal", lo.emit("Sqrt", node, args[0]))


def _power(lo: Lowering, node: Node, args: Args) -> Value:
    if args[1] == 2:
        return lo.emit("Mul", node, args[0], args[0])
    return lo.emit("Pow", node, *args)


def _addmm(lo: Lowering, node: Node, args: Args) -> Value:
    bias, left, right = args
    if node.kwargs:
        raise ConfigError(f"{node.target} with alpha or beta has no ONNX form in a plan")
    return lo.writer.node("Gemm", lo.tensor(left), lo.tensor(right), lo.tensor(bias))


def _softmax(name: str) -> Rule:
    return lambda lo, node, args: lo.writer.node(name, lo.tensor(args[0]), axis=args[1])


def _convolution(lo: Lowering, node: Node, args: Args) -> Value:
    x, kernel, bias, stride, padding, dilation, transposed, _, groups = args
    inputs = [lo.tensor(x), lo.tensor(kernel), *([] if bias is None else [lo.tensor(bias)])]
    return lo.writer.node(
        "ConvTranspose" if transposed else "Conv",
        *inputs,
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )


def _batch_norm(lo: Lowering, node: Node, args: Args) -> tuple[Value]:
    """Normalisation with given statistics; the variants that compute them never reach this table."""
    legit = node.target is _ATEN._native_batch_norm_legit_no_training.default  # noqa: SLF001 - the name of the operator
    if not legit and args[5]:
        raise ConfigError("batch normalisation in training form must be compiled with the plan's layers")
    value = lo.writer.node(
        "BatchNormalization",
        *(lo.tensor(a) for a in args[:5]),
        epsilon=float(args[-1]),
    )
    return (value,)


def _layer_norm(lo: Lowering, node: Node, args: Args) -> tuple[Value, ...]:
    x, shape, weight, bias, epsilon = args
    return lo.writer.nodes(
        "LayerNormalization",
        [lo.tensor(x), lo.tensor(weight), lo.tensor(bias)],
        3,
        axis=-len(shape),
        epsilon=float(epsilon),
    )


def _max_pool(lo: Lowering, node: Node, args: Args) -> tuple[Value]:
    """The pool of evaluation, traced as a two-dimensional one with a height of one."""
    x, size, stride = (*args, None)[:3]
    if len(args) > 3 and any(args[3]):
        raise ConfigError("max-pool with padding has no ONNX form in a plan")
    return (lo.writer.node("MaxPool", lo.tensor(x), kernel_shape=list(size), strides=list(stride or size)),)


def _argmax(lo: Lowering, node: Node, args: Args) -> Value:
    keep = int(bool(args[2])) if len(args) > 2 else 0
    return lo.writer.node("ArgMax", lo.tensor(args[0]), axis=args[1], keepdims=keep)


def _shift_right(lo: Lowering, node: Node, args: Args) -> Value:
    """Of numbers that are not negative (``integer_ranges`` makes no others)."""
    x, amount = args
    if int(np.prod(shape_of(node))) <= _LARGE:
        return lo.writer.node("Div", lo.tensor(x), lo.writer.constant(np.asarray(1 << amount)))
    unsigned = lo.writer.node("Cast", lo.tensor(x), to=onnx_type("uint64"))
    amount_value = lo.writer.constant(np.asarray(amount, np.uint64), "uint64")
    shifted = lo.writer.node("BitShift", unsigned, amount_value, direction="RIGHT")
    return lo.writer.node("Cast", shifted, to=onnx_type("int64"))


def _divide(lo: Lowering, node: Node, args: Args) -> Value:
    if node.kwargs.get("rounding_mode") is not None:
        return lo.writer.node("Floor", lo.emit("Div", node, *args))
    right = args[1]
    if isinstance(right, float | int) and dtype_of(node) == "float32":
        return lo.emit("Mul", node, args[0], 1.0 / right)
    return lo.emit("Div", node, *args)


def _where(lo: Lowering, node: Node, args: Args) -> Value:
    dtype = dtype_of(node)
    condition, left, right = args
    return lo.writer.node("Where", lo.tensor(condition), lo.tensor(left, dtype), lo.tensor(right, dtype))


_TABLE: Final[dict[Any, Rule]] = {
    _ATEN._log_softmax: _softmax("LogSoftmax"),  # noqa: SLF001 - the name of the operator
    _ATEN._native_batch_norm_legit_no_training: _batch_norm,  # noqa: SLF001
    _ATEN._softmax: _softmax("Softmax"),  # noqa: SLF001
    _ATEN._to_copy: _same,  # noqa: SLF001
    _ATEN._unsafe_view: _reshape,  # noqa: SLF001
    _ATEN.abs: _elementwise("Abs"),
    _ATEN.add: _scaled("Add"),
    _ATEN.addmm: _addmm,
    _ATEN.alias: _same,
    _ATEN.amax: _reduce("ReduceMax"),
    _ATEN.arange: _arange,
    _ATEN.argmax: _argmax,
    _ATEN.bitwise_and: _bitwise("And"),
    _ATEN.bitwise_or: _bitwise("Or"),
    _ATEN.bitwise_right_shift: _shift_right,
    _ATEN.bitwise_xor: _bitwise("Xor"),
    _ATEN.bmm: _elementwise("MatMul"),
    _ATEN.cat: _concat,
    _ATEN.clamp: _clamp,
    _ATEN.clone: _same,
    _ATEN.convolution: _convolution,
    _ATEN.detach: _same,
    _ATEN.div: _divide,
    _ATEN.eq: _compare("Equal"),
    _ATEN.exp: _elementwise("Exp"),
    _ATEN.expand: _expand,
    _ATEN.full: _filled,
    _ATEN.full_like: _filled,
    _ATEN.ge: _compare("GreaterOrEqual"),
    _ATEN.gt: _compare("Greater"),
    _ATEN.le: _compare("LessOrEqual"),
    _ATEN.log: _elementwise("Log"),
    _ATEN.lt: _compare("Less"),
    _ATEN.max_pool2d_with_indices: _max_pool,
    _ATEN.maximum: _elementwise("Max"),
    _ATEN.mean: _reduce("ReduceMean"),
    _ATEN.minimum: _elementwise("Min"),
    _ATEN.mm: _elementwise("MatMul"),
    _ATEN.mul: _elementwise("Mul"),
    _ATEN.native_batch_norm: _batch_norm,
    _ATEN.native_layer_norm: _layer_norm,
    _ATEN.neg: _elementwise("Neg"),
    _ATEN.permute: _permute,
    _ATEN.pow: _power,
    _ATEN.reciprocal: _elementwise("Reciprocal"),
    _ATEN.relu: _elementwise("Relu"),
    _ATEN.rsqrt: _rsqrt,
    _ATEN.scalar_tensor: _filled,
    _ATEN.select: _select,
    _ATEN.sigmoid: _elementwise("Sigmoid"),
    _ATEN.slice: _slice,
    _ATEN.slice_scatter: _slice_scatter,
    _ATEN.split_with_sizes: _split,
    _ATEN.sqrt: _elementwise("Sqrt"),
    _ATEN.squeeze: _reshape,
    _ATEN.sub: _scaled("Sub"),
    _ATEN.sum: _reduce("ReduceSum"),
    _ATEN.tanh: _elementwise("Tanh"),
    _ATEN.unsqueeze: _reshape,
    _ATEN.view: _reshape,
    _ATEN.where: _where,
}
