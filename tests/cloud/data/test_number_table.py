"""Strict parsing of number tables."""

from __future__ import annotations

import numpy as np
import pytest
from wearfleet_cloud.data.number_table import parse_table
from wearfleet_protos.errors import DataError


@pytest.mark.parametrize(
    "text", [b"1 2.5\n-3 4e-2\n", b"1\t2.5\r\n-3\t4e-2", b"1,2.5\n-3,4e-2\n\n", b"  1  2.5 \n -3 4e-2 "]
)
def test_separators_and_line_ends_do_not_matter(text: bytes) -> None:
    np.testing.assert_array_equal(parse_table(text, 2, "file"), [[1.0, 2.5], [-3.0, 0.04]])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"1 2\n3 x\n", "expected 2 numbers a row"),
        (b"1 2\n3\n", "in each of 2 lines, got 3"),
        (b"", "got 0 numbers"),
        (b"1 2\n3 nan\n", "NaN"),
        (b"1 2\n3 inf\n", "infinity"),
    ],
)
def test_anything_but_a_full_finite_table_is_refused(text: bytes, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        parse_table(text, 2, "file")


def test_lost_values_are_read_where_they_are_expected() -> None:
    np.testing.assert_array_equal(
        parse_table(b"1 NaN\nnan 4\n", 2, "file", missing=True), [[1, np.nan], [np.nan, 4]]
    )
    with pytest.raises(DataError, match="holds infinity"):
        parse_table(b"1 NaN\n3 inf\n", 2, "file", missing=True)


def test_a_number_moved_to_the_next_line_is_noticed() -> None:
    with pytest.raises(DataError, match="3 lines"):
        parse_table(b"1 2\n3\n4 5 6 7\n", 2, "file")
