"""Turns integer divisions of a traced graph into shifts.

``x // n`` of integers is traced as a division rounded down, which the ONNX exporter carries out in float32: wrong
above 2**24, where the words of a counter-based random number live. Where ``n`` is a power of two and interval
arithmetic over the graph proves that ``x`` is not negative, a right shift is equal, exact and fast. Other integer
divisions are refused.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from wearfleet_protos.errors import ConfigError

__all__ = ["shift_divisions"]

Range = tuple[int, int]

_ATEN: Final = torch.ops.aten
_ANY: Final[Range] = (-(2**63), 2**63 - 1)


def shift_divisions(module: GraphModule, inputs: Mapping[Node, Range]) -> None:
    """Replace integer division by a power of two by a right shift.

    Args:
        module: a traced graph; changed in place.
        inputs: smallest and largest value of integer inputs, by their placeholder; others may be anything.

    Raises:
        ConfigError: an integer division that is not provably equal to a shift.
    """
    ranges: dict[Node, Range] = {}
    for node in module.graph.nodes:
        ranges[node] = _range_of(node, ranges, inputs, module)
        if not _divides_integers(node):
            continue
        divisor, lowest = _constant(node.args[1], ranges), _operand(node.args[0], ranges)[0]
        if divisor is None or divisor < 1 or divisor & (divisor - 1) or lowest < 0:
            raise ConfigError(
                "a plan's step may divide integers only by a power of two, and only numbers that cannot be negative; "
                f"got {node.format_node()} with smallest dividend {lowest}"
            )
        node.target = _ATEN.bitwise_right_shift.Tensor_Scalar
        node.args, node.kwargs = (node.args[0], divisor.bit_length() - 1), {}
    module.recompile()


def _divides_integers(node: Node) -> bool:
    if getattr(node.target, "overloadpacket", None) is not _ATEN.div or "rounding_mode" not in node.kwargs:
        return False
    return not node.meta["val"].dtype.is_floating_point


def _constant(value: object, ranges: Mapping[Node, Range]) -> int | None:
    low, high = _operand(value, ranges)
    return low if low == high else None


def _operand(value: object, ranges: Mapping[Node, Range]) -> Range:
    if isinstance(value, Node):
        return ranges[value]
    return (value, value) if isinstance(value, int) else _ANY


def _range_of(
    node: Node, ranges: Mapping[Node, Range], inputs: Mapping[Node, Range], module: GraphModule
) -> Range:
    if node.op == "placeholder":
        return inputs.get(node, _ANY)
    if node.op == "get_attr":
        return _range_of_tensor(operator.attrgetter(str(node.target))(module))
    rule = _RULES.get(getattr(node.target, "overloadpacket", None))
    if node.op != "call_function" or rule is None:
        return _ANY
    low, high = rule(node, ranges)
    return (low, high) if _ANY[0] <= low and high <= _ANY[1] else _ANY  # an overflow may end anywhere


def _range_of_tensor(tensor: Tensor) -> Range:
    if tensor.is_floating_point() or tensor.numel() == 0:
        return _ANY
    return int(tensor.min()), int(tensor.max())


def _same(node: Node, ranges: Mapping[Node, Range]) -> Range:
    return _operand(node.args[0], ranges)


def _arange(node: Node, _: Mapping[Node, Range]) -> Range:
    numbers = [a for a in node.args if isinstance(a, int)]
    if len(numbers) != len(node.args) or len(numbers) > 2:
        return _ANY
    start, end = (0, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])
    return start, max(start, end - 1)


def _full(node: Node, ranges: Mapping[Node, Range]) -> Range:
    return _operand(node.args[1], ranges)


def _corners(combine: Callable[[int, int], int]) -> Callable[[Node, Mapping[Node, Range]], Range]:
    """Range of a function that is monotone in each operand: its values at the corners."""

    def rule(node: Node, ranges: Mapping[Node, Range]) -> Range:
        left, right = _operand(node.args[0], ranges), _operand(node.args[1], ranges)
        values = [combine(a, b) for a in left for b in right]
        return min(values), max(values)

    return rule


def _and(node: Node, ranges: Mapping[Node, Range]) -> Range:
    highs = [r[1] for r in (_operand(a, ranges) for a in node.args[:2]) if r[0] >= 0]
    return (0, min(highs)) if highs else _ANY


def _xor(node: Node, ranges: Mapping[Node, Range]) -> Range:
    left, right = _operand(node.args[0], ranges), _operand(node.args[1], ranges)
    if left[0] < 0 or right[0] < 0:
        return _ANY
    return 0, (1 << max(left[1].bit_length(), right[1].bit_length())) - 1


def _divide(node: Node, ranges: Mapping[Node, Range]) -> Range:
    divisor = _constant(node.args[1], ranges)
    if divisor is None or divisor < 1:
        return _ANY
    low, high = _operand(node.args[0], ranges)
    return low // divisor, high // divisor


_RULES: Final[dict[Any, Callable[[Node, Mapping[Node, Range]], Range]]] = {
    _ATEN.view: _same,
    _ATEN.reshape: _same,
    _ATEN._unsafe_view: _same,  # noqa: SLF001 - the name of the operator
    _ATEN.clone: _same,
    _ATEN.lift_fresh_copy: _same,
    _ATEN.unsqueeze: _same,
    _ATEN.arange: _arange,
    _ATEN.full: _full,
    _ATEN.scalar_tensor: _same,
    _ATEN.add: _corners(operator.add),
    _ATEN.sub: _corners(operator.sub),
    _ATEN.mul: _corners(operator.mul),
    _ATEN.bitwise_and: _and,
    _ATEN.bitwise_xor: _xor,
    _ATEN.div: _divide,
}
