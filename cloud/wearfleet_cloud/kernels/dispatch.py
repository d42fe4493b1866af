"""Which tensors go to Triton."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["takes_triton"]


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def takes_triton(*tensors: Tensor) -> bool:
    """Whether Triton kernels compute on these tensors: all on CUDA, floating ones float32 or bfloat16.

    Everything else (the CPU, float64, float16, no Triton installed) goes to the reference. Tensors inside
    ``torch.func`` transforms are judged by the tensors that they wrap.
    """
    return _has_triton() and all(
        tensor.is_cuda and (not tensor.is_floating_point() or tensor.dtype in (torch.float32, torch.bfloat16))
        for tensor in tensors
    )
