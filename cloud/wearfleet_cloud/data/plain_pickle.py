"""Read arrays of numbers out of a pickle without running a line that it brings.

A pickle is a program: it names functions, and whoever loads it calls them. Here only five names mean anything, and
what they mean is in this file, never NumPy's own: an array arrives as shape, type and bytes, which are checked and
then looked at. Every other name is refused before it is looked up. What the names stand for has no attributes that a
pickle could set, and nothing is walked through but the path that is asked for.

Python 2 wrote such files (WESAD's): its strings, and with them the bytes of its arrays, are read as Latin-1.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from wearfleet_protos.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PlainPickle"]

_KINDS: Final = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})
_ORDERS: Final = {"<": "<", ">": ">", "|": "=", "=": "="}
_REFUSED: Final = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class _Type:
    """A number type as pickled: its name, then a state whose second entry is the byte order."""

    __slots__ = ("dtype",)

    def __init__(self, name: object) -> None:
        if name not in _KINDS:
            raise pickle.UnpicklingError(f"arrays of type {name!r} are not numbers")
        self.dtype = np.dtype(str(name))

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in _ORDERS:
            raise pickle.UnpicklingError(f"byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(_ORDERS[str(order)])  # type: ignore[arg-type]


class _Array:
    """An array as pickled; its state holds version, shape, type, order and bytes."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: NDArray[Any] | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array without version, shape, type, order and bytes")
        _, shape, kind, by_columns, data = state
        raw = data.encode("latin-1") if isinstance(data, str) else data
        whole = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if not whole or not isinstance(kind, _Type) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array of something else than numbers")
        if math.prod(shape) * kind.dtype.itemsize != len(raw):
            raise pickle.UnpicklingError(f"an array {shape} of {kind.dtype} with {len(raw)} bytes")
        self.value = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if by_columns else "C")


class _ArrayClass:
    """Stands for ``numpy.ndarray``, which is only ever an argument: it cannot be called."""

    __slots__ = ()


class _NewArray:
    """Stands for NumPy's ``_reconstruct``."""

    __slots__ = ()

    def __call__(self, *_: object) -> _Array:
        return _Array()


class _NewType:
    """Stands for ``numpy.dtype``."""

    __slots__ = ()

    def __call__(self, name: object, *_: object) -> _Type:
        return _Type(name)


class _AsBytes:
    """Stands for ``_codecs.encode``: how Python 3 writes bytes for older readers, as text and the word ``latin1``."""

    __slots__ = ()

    def __call__(self, text: object, encoding: object) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("bytes in another form than Latin-1 text")
        return text.encode("latin-1")


_NAMES: Final = {
    ("numpy.core.multiarray", "_reconstruct"): _NewArray(),
    ("numpy._core.multiarray", "_reconstruct"): _NewArray(),
    ("numpy", "ndarray"): _ArrayClass(),
    ("numpy", "dtype"): _NewType(),
    ("_codecs", "encode"): _AsBytes(),
}


class _Reader(pickle.Unpickler):
    """Admits the names above, no others."""

    def find_class(self, module: str, name: str) -> object:
        """What a name stands for."""
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _NAMES[module, name]


class PlainPickle:
    """A pickle of arrays in dictionaries that text is the key of.

    Args:
        content: of the file.
        where: the file's name, for messages.

    Raises:
        DataError: damaged, or it names something that is neither an array nor a number type.
    """

    def __init__(self, content: bytes, where: str) -> None:
        self._where = where
        try:
            self._root: object = _Reader(io.BytesIO(content), encoding="latin-1").load()
        except _REFUSED as error:
            raise DataError(
                f"{where}: not a pickle of plain arrays ({error}); it is damaged or not the official file, and nothing "
                "of it was run"
            ) from error

    def array(self, *path: str) -> NDArray[Any]:
        """The array under these keys, read-only.

        Raises:
            DataError: there is none.
        """
        value = self._root
        for key in path:
            value = value.get(key) if type(value) is dict else None
        if not isinstance(value, _Array) or value.value is None:
            raise DataError(f"{self._where}: expected an array under {' / '.join(path)}, got none")
        return value.value
