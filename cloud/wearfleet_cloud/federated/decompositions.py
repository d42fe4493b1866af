"""How a traced training step is rewritten before it becomes ONNX.

The decompositions replace operators of the backward pass that ONNX does not have, or that ONNX Runtime executes
slowly, by equal ones.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from wearfleet_protos.errors import ConfigError

__all__ = ["decompositions"]

_ATEN: Final = torch.ops.aten


@cache
def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Core ATen decompositions, with ours in place of those of the backward passes."""
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    table[_ATEN.convolution_backward.default] = _convolution_backward
    table[_ATEN.threshold_backward.default] = _threshold_backward
    return MappingProxyType(table)


def _threshold_backward(grad: Tensor, output: Tensor, threshold: float) -> Tensor:
    return grad * (output > threshold).to(grad.dtype)


def _convolution_backward(  # noqa: PLR0917 - ATen's signature
    grad: Tensor,
    x: Tensor,
    kernel: Tensor,
    bias_sizes: Sequence[int] | None,  # noqa: ARG001
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a one-dimensional convolution as convolutions.

    Input: the transposed convolution of ``grad`` with the kernel. Kernel: one two-dimensional convolution over
    (window as channel, channel as row, time), with ``grad`` as its kernel; it needs no transposition of ``x`` and is
    one large matrix product, twice as fast in ONNX Runtime as swapping batch and channel axes.

    With B windows: ``grad`` (B, O, L), ``x`` (B, C, T), ``kernel`` (O, C, k); the rest as in
    ``aten::convolution_backward``. The gradient for the kernel of each of G windows by itself comes as one of G groups:
    ``grad`` (1, G O, L), ``x`` (1, G C, T), and is the same two-dimensional convolution in G groups.

    Raises:
        ConfigError: the convolution is not a plain one (stride 1, no padding or dilation, one dimension; groups only
            for the kernel, of one window).
    """
    plain = (tuple(stride), tuple(padding), tuple(dilation), transposed) == ((1,), (0,), (1,), False)
    by_window = x.shape[0] == 1 and tuple(output_mask) == (False, True, False)
    if not plain or grad.dim() != 3 or (groups != 1 and not by_window):
        raise ConfigError(
            "a plan's training step supports Conv1d with stride 1, no padding, no dilation and one group; "
            f"got stride {list(stride)}, padding {list(padding)}, dilation {list(dilation)}, groups {groups}"
        )
    windows, channels, length = x.shape
    grad_x = grad_kernel = None
    if output_mask[0]:
        grad_x = _ATEN.convolution(grad, kernel, None, [1], [0], [1], True, output_padding, 1)
    if output_mask[1]:
        rows = x.reshape(1, windows * groups, channels // groups, length)
        taps = grad.transpose(0, 1).reshape(grad.shape[1], windows, 1, grad.shape[2])
        grad_kernel = _ATEN.convolution(rows, taps, None, [1, 1], [0, 0], [1, 1], False, [0, 0], groups)
        grad_kernel = grad_kernel.reshape(kernel.shape)
    return grad_x, grad_kernel, grad.sum(dim=2).sum(dim=0) if output_mask[2] else None
