"""Laws of robust aggregation that hold for every cohort, on the public functions."""

import pytest
import torch
from wearfleet_cloud.kernels.robust import (
    clip_factors,
    coordinate_median,
    squared_distances,
    squared_norms,
    trimmed_mean,
    weighted_mean,
)

hypothesis = pytest.importorskip("hypothesis", reason="a GPU machine has pytest alone")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

whole = st.integers(-1000, 1000).map(float)


@st.composite
def cohorts(draw):
    """Updates of whole numbers, so that sums are exact, and how many to trim."""
    width = draw(st.integers(1, 3))
    rows = draw(st.lists(st.lists(whole, min_size=width, max_size=width), min_size=1, max_size=9))
    return torch.tensor(rows), draw(st.integers(0, (len(rows) - 1) // 2))


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(cohort, random):
    updates, trim = cohort
    order = list(range(len(updates)))
    random.shuffle(order)
    assert torch.equal(coordinate_median(updates[order]), coordinate_median(updates))
    assert torch.equal(trimmed_mean(updates[order], trim), trimmed_mean(updates, trim))
    assert torch.equal(squared_distances(updates[order]), squared_distances(updates)[order][:, order])


@settings(max_examples=60, deadline=None)
@given(cohorts(), whole, st.sampled_from([-4.0, -1.0, 0.5, 2.0]))
def test_all_updates_moved_or_stretched_move_and_stretch_the_result(cohort, shift, factor):
    """Halves of whole numbers and powers of two: the median is exact, the trimmed mean rounded once."""
    updates, trim = cohort
    changed = factor * updates + shift
    assert torch.equal(coordinate_median(changed), factor * coordinate_median(updates) + shift)
    torch.testing.assert_close(
        trimmed_mean(changed, trim),
        factor * trimmed_mean(updates, trim) + shift,
        rtol=0,
        atol=2.0**-23 * 5000,
    )
    torch.testing.assert_close(
        squared_distances(changed), factor**2 * squared_distances(updates), rtol=1e-15, atol=0
    )


@settings(max_examples=60, deadline=None)
@given(cohorts())
def test_trimming_runs_from_the_mean_to_the_median(cohort):
    updates, _ = cohort
    most = (len(updates) - 1) // 2
    torch.testing.assert_close(trimmed_mean(updates, 0), updates.double().mean(0).float())
    assert torch.equal(trimmed_mean(updates, most), coordinate_median(updates))
    assert torch.equal(weighted_mean(updates, torch.ones(len(updates))), trimmed_mean(updates, 0))


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.floats(width=32, allow_nan=False), st.data())
def test_one_outlier_stays_within_the_range_of_the_others(cohort, lie, data):
    updates, _ = cohort
    if len(updates) < 3:
        updates = updates.repeat(3, 1)
    liar = data.draw(st.integers(0, len(updates) - 1))
    honest = torch.cat([updates[:liar], updates[liar + 1 :]])
    updates[liar] = lie
    for found in (coordinate_median(updates), trimmed_mean(updates, 1)):
        assert (found <= honest.amax(0)).all()
        assert (found >= honest.amin(0)).all()


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.floats(0.01, 1e4))
def test_no_clipped_update_is_longer_than_the_bound_and_short_ones_are_kept(cohort, bound):
    updates, _ = cohort
    factors = clip_factors(updates, bound)
    lengths = squared_norms(updates).sqrt()
    assert (factors * lengths <= bound * (1 + 2.0**-50)).all()
    assert torch.equal(factors[lengths <= bound], torch.ones_like(factors[lengths <= bound]))
