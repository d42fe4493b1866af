"""Bridging lost samples and finding what is left."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from wearfleet_cloud.data.gaps import bridge, stretches

NAN = np.nan


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def test_a_short_gap_is_a_straight_line_and_a_long_one_stays() -> None:
    signal = column(0, NAN, NAN, 3, NAN, NAN, NAN, 7)
    np.testing.assert_array_equal(bridge(signal, 2), column(0, 1, 2, 3, NAN, NAN, NAN, 7))
    np.testing.assert_array_equal(bridge(signal, None), column(0, 1, 2, 3, 4, 5, 6, 7))
    np.testing.assert_array_equal(bridge(signal, 1), signal)


def test_ends_and_empty_channels_are_not_invented() -> None:
    np.testing.assert_array_equal(bridge(column(NAN, 1, NAN, 2, NAN), None), column(NAN, 1, 1.5, 2, NAN))
    np.testing.assert_array_equal(bridge(column(NAN, NAN), None), column(NAN, NAN))
    both = np.column_stack(([1.0, NAN, 3.0], [NAN, NAN, NAN]))
    np.testing.assert_array_equal(bridge(both, None), np.column_stack(([1.0, 2.0, 3.0], [NAN] * 3)))


@settings(max_examples=80, deadline=None)
@given(arrays(np.bool_, st.integers(1, 30)), st.integers(0, 6))
def test_what_is_bridged_lies_in_a_gap_between_known_values_of_at_most_the_limit(
    lost: np.ndarray, longest: int
) -> None:
    line = np.arange(len(lost), dtype=np.float64)  # interpolation of a line gives the line
    filled = bridge(np.where(lost, NAN, line)[:, None], longest)[:, 0]
    for gap in stretches(lost):
        inside = gap.start > 0 and gap.stop < len(lost) and gap.stop - gap.start <= longest
        expected = line[gap] if inside else np.full(gap.stop - gap.start, NAN)
        np.testing.assert_allclose(
            filled[gap], expected, rtol=0, atol=1e-12
        )  # a few roundings of numbers below 30
    np.testing.assert_array_equal(filled[~lost], line[~lost])


@settings(max_examples=80, deadline=None)
@given(arrays(np.bool_, st.integers(0, 30)))
def test_stretches_cover_just_what_is_usable_and_do_not_touch(usable: np.ndarray) -> None:
    found = stretches(usable)
    covered = np.zeros(len(usable), np.bool_)
    for piece in found:
        assert piece.stop > piece.start
        covered[piece] = True
    np.testing.assert_array_equal(covered, usable)
    assert all(one.stop < other.start for one, other in pairwise(found))
