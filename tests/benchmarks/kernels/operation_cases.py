"""What an operation tells the kernel benchmark about itself; one file an operation beside this one.

A file ``<operation>.py`` holds ``CASES``, a list of `Case`; ``bench_kernels.py`` finds it by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Function = Callable[..., Tensor]
Part = Literal["forward", "backward"]


@dataclass(frozen=True)
class Case:
    """One operation at several shapes.

    Args:
        name: of the operation, with its form where it has several: "mmd", "margin/arcface".
        wearable: small shapes by name, each with its sizes: {"4x32x832": {"domains": 4, ...}}.
        large: the same for large shapes.
        make: (sizes, dtype, generator) -> differentiable tensors and other arguments, on the generator's device.
        ours: the package's public function; takes the differentiable tensors, then the others; returns a scalar, or a
            tensor whose sum is differentiated.
        eager: how a good engineer writes it in PyTorch without the closed form; the same arguments and result.
            ``torch.compile`` of this very function is the third competitor.
        bytes: (sizes, element size) -> bytes that must at least cross memory in each part.
        operations: (sizes) -> floating-point operations of each part.
        bound_by: what limits the operation at its large shapes.
        naive: another slow way, shown beside the others on a CPU, such as per-sample gradients by autograd.
        relative: largest error against float64, relative to the largest value of the result, by dtype. A row whose
            error is larger is reported without a time.
        no_backward: the operation has no gradient.
        memory_limit: leave out competitors whose own memory would exceed it: (sizes) -> bytes of the eager form.
    """

    name: str
    wearable: Mapping[str, Mapping[str, int]]
    large: Mapping[str, Mapping[str, int]]
    make: Callable[
        [Mapping[str, int], torch.dtype, torch.Generator], tuple[tuple[Tensor, ...], tuple[object, ...]]
    ]
    ours: Function
    eager: Function
    bytes: Callable[[Mapping[str, int], int], Mapping[Part, float]]
    operations: Callable[[Mapping[str, int]], Mapping[Part, float]]
    bound_by: Literal["memory", "arithmetic"]
    naive: Function | None = None
    relative: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-4, torch.bfloat16: 2e-2}
    )
    no_backward: bool = False
    memory_limit: Callable[[Mapping[str, int]], float] | None = None
