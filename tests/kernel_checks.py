"""What all kernel tests share: float64 truth on the inputs as rounded, derived bounds, and planted errors."""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

EPS32 = 2.0**-24  # unit roundoff of the accumulation
FLUSHED = (
    2.0**-126
)  # the smallest normal number of float32 and bfloat16: a device may take smaller ones for 0
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}


def value_and_gradients(
    function: Callable[..., Tensor], differentiable: Sequence[Tensor], *others: object
) -> tuple[Tensor, list[Tensor]]:
    """A scalar (or summed) result and its gradient by each of the first tensors, which stay untouched."""
    return result_and_gradients(function, torch.ones(()), differentiable, *others)


def result_and_gradients(
    function: Callable[..., Tensor], upstream: Tensor, differentiable: Sequence[Tensor], *others: object
) -> tuple[Tensor, list[Tensor]]:
    """A result of one run, and the gradients of its sum in which every number is multiplied by its ``upstream``."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in differentiable]
    result = function(*leaves, *others)
    gradients = torch.autograd.grad((result * upstream.to(result.device)).sum(), leaves)
    return result.detach(), list(gradients)


def truth(
    function: Callable[..., Tensor], differentiable: Sequence[Tensor], *others: object
) -> tuple[Tensor, list[Tensor]]:
    """The same of a reference in float64, on the values that the tensors have after rounding to their own type."""
    exact = [tensor.double().cpu() for tensor in differentiable]
    rest = [
        other.cpu().double()
        if isinstance(other, Tensor) and other.is_floating_point()
        else other.cpu()
        if isinstance(other, Tensor)
        else other
        for other in others
    ]
    return value_and_gradients(function, exact, *rest)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str = "") -> None:
    """|actual - expected| <= bound + rounding of the result to its own type; nothing is NaN or of another shape.

    Args:
        actual: any shape, of the kernel.
        expected: same shape, float64.
        bound: same shape or one number, float64: the error that float32 accumulation may make, derived by the caller.
        what: named in the message.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    found = actual.double().cpu()
    assert not found.isnan().any(), f"{what}: NaN"
    roundoff = ROUNDOFF[actual.dtype]
    if actual.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        roundoff *= 2  # Triton's interpreter cuts off the digits that a GPU rounds
    allowed = bound + expected.abs() * roundoff
    excess = ((found - expected).abs() / torch.as_tensor(allowed).clamp_min(1e-300)).max().item()
    assert excess <= 1.0, f"{what}: error is {excess:.3g} times its bound"


def planted(module: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of a kernel's module with one place changed: what a test must notice.

    The place must occur exactly once, so that a rewritten kernel cannot silently make the test pass.
    """
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
    folder = Path(__file__).resolve().parents[1] / "runs" / "planted"
    folder.mkdir(parents=True, exist_ok=True)
    mark = zlib.crc32((old + new).encode())
    name = f"planted_{module.__name__.replace('.', '_')}_{mark:x}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy
