"""Whether operations run as they are called, so that what only autograd must understand may be used."""

import torch

__all__ = ["runs_plainly"]


def runs_plainly() -> bool:
    """False under a transformation of ``torch.func`` and in a trace (torch has no public name for either)."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
    return not (transformed or torch._C._len_torch_dispatch_stack() > 0)  # noqa: SLF001
