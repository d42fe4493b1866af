"""A watch over operations that make the host wait for a value of the device."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoReading"]


class NoReading(TorchDispatchMode):
    """Fails on every operation that makes the host wait for a value of the device."""

    forbidden = frozenset({"_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "masked_select"})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.forbidden, f"{func} reads a value back"
        return func(*args, **(kwargs or {}))
