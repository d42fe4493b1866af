"""Kernel tests run on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before its module is imported


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(scope="session", autouse=True)
def one_patch_a_launch() -> Iterator[None]:
    """Triton's interpreter patches its language again at every call of a device function; once a launch is the same.

    What a launch patched stays patched until it ends, so only a language that it has not met yet needs the work.
    """
    from triton.runtime import interpreter

    if CUDA or not hasattr(interpreter, "_LangPatchScope"):  # other versions do it in another way
        yield
        return
    patch, met = interpreter._patch_lang, set()

    class Launch(interpreter._LangPatchScope):
        def restore(self):
            met.clear()
            super().restore()

    def patch_once(function):
        seen = frozenset(id(value) for value in function.__globals__.values() if inspect.ismodule(value))
        scope = Launch()
        if seen not in met:
            scope._changes = patch(function)._changes
            met.add(seen)
        return scope

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN (the largest value for integers), so that an element that is never written shows."""
    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"), (torch, "empty_strided"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(make):
    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

    return poisoned


@pytest.fixture(autouse=True)
def exact_products():
    """Full float32 products in references that run on the GPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
