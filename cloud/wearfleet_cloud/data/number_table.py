"""Parse a rectangular table of numbers from text, fast and strictly."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from wearfleet_protos.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["parse_table"]


def parse_table(text: bytes, columns: int, where: str, *, missing: bool = False) -> NDArray[np.float64]:
    """Numbers separated by blanks, tabs or commas, one row a line.

    Args:
        text: the file's content, without a header line.
        columns: numbers that every row must have.
        where: the file's name, for messages.
        missing: True when NaN stands for a value that was lost.

    Returns:
        (rows, columns) float64, at least one row.

    Raises:
        DataError: something that is no number, a row of another length, infinity, NaN that is not expected, or no
            row at all.
    """
    text = text.rstrip()
    lines = text.count(b"\n") + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # how NumPy reports text that is not a number
        try:
            values = np.fromstring(text.replace(b",", b" "), dtype=np.float64, sep=" ")
        except (DeprecationWarning, ValueError) as error:
            raise DataError(
                f"{where}: expected {columns} numbers a row, got something else ({error})"
            ) from error
    if values.size == 0 or values.size != lines * columns:
        raise DataError(
            f"{where}: expected {columns} numbers in each of {lines} lines, got {values.size} numbers; "
            "the file is truncated or not of this data set"
        )
    bad = np.isinf(values) if missing else ~np.isfinite(values)
    if bool(bad.any()):
        raise DataError(
            f"{where}: holds {'infinity' if missing else 'NaN or infinity'}; expected measured values"
        )
    return values.reshape(lines, columns)
