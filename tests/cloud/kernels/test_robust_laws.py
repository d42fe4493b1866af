"""Laws and known answers of robust aggregation, on the public functions and the kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wearfleet_cloud.kernels.robust import (
    clip_factors,
    coordinate_median,
    kernel,
    squared_distances,
    squared_norms,
    trimmed_mean,
    weighted_mean,
)

MEDIANS = [kernel.median_triton, coordinate_median]
TRIMMED = [kernel.trimmed_mean_triton, trimmed_mean]
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


@pytest.mark.parametrize("count", [9, 10, 65, 66])
def test_outliers_in_the_minority_stay_within_the_others(count, device):
    honest = torch.randn(count, 30, generator=torch.Generator().manual_seed(0))
    liars = (count - 1) // 2
    spoilt = honest.clone()
    spoilt[:liars] = torch.tensor([1e30, -torch.inf, torch.inf]).repeat(10)
    for median in MEDIANS:
        _within(median(spoilt.to(device)), honest[liars:])
    for trimmed in TRIMMED:
        _within(trimmed(spoilt.to(device), liars), honest[liars:])


def _within(found, others):
    assert (found.cpu() <= others.amax(0)).all()
    assert (found.cpu() >= others.amin(0)).all()


def test_one_update_is_its_own_aggregate(device):
    update = torch.tensor([[1.5, -0.0, 2.0**-149, 3e38]])
    for median in MEDIANS:
        assert torch.equal(median(update.to(device)).cpu(), update[0])
    for trimmed in TRIMMED:
        assert torch.equal(trimmed(update.to(device), 0).cpu(), update[0])
    assert torch.equal(weighted_mean(update, torch.tensor([7.0])), update[0])
    assert squared_distances(update).tolist() == [[0.0]]


def test_two_updates_meet_in_the_middle_also_where_their_sum_is_no_float(device):
    updates = torch.tensor([[1.0, 3e38, -1.0], [2.0, 3.2e38, 1.0]])
    for median in MEDIANS:
        torch.testing.assert_close(median(updates.to(device)).cpu(), torch.tensor([1.5, 3.1e38, 0.0]))
    for trimmed in TRIMMED:
        torch.testing.assert_close(trimmed(updates.to(device), 0).cpu(), torch.tensor([1.5, 3.1e38, 0.0]))


@pytest.mark.parametrize("repeats", [1, 20])  # few updates are sorted, many are selected from
def test_known_answers_with_ties(repeats, device):
    """By hand: 1 1 2 5 5 has the median 2 and without its ends the mean 8/3; 1 1 2 2 5 5 the median 2."""
    odd = torch.tensor([5.0, 1, 2, 1, 5]).repeat(repeats, 1).T.reshape(-1, 1)
    even = torch.tensor([5.0, 1, 2, 1, 5, 2]).repeat(repeats, 1).T.reshape(-1, 1)
    halves = torch.tensor([1.0, 1, 4, 4]).repeat(repeats, 1).T.reshape(-1, 1)
    for median in MEDIANS:
        assert [median(case.to(device)).item() for case in (odd, even, halves)] == [2.0, 2.0, 2.5]
    for trimmed in TRIMMED:
        assert trimmed(odd.to(device), repeats).item() == pytest.approx(8 / 3, rel=1e-7)
        assert trimmed(torch.full_like(even, 0.1).to(device), 2).item() == torch.tensor(0.1).item()


def test_equal_weights_make_the_mean_and_weights_count():
    updates = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weighted_mean(updates, torch.ones(5)), updates.double().mean(0).float())
    assert torch.equal(weighted_mean(updates, torch.tensor([0.0, 0, 1, 0, 0])), updates[2])
    twice = torch.cat([updates, updates[:1]])
    torch.testing.assert_close(
        weighted_mean(updates, torch.tensor([2.0, 1, 1, 1, 1])), weighted_mean(twice, torch.ones(6))
    )
    assert weighted_mean(updates.double(), torch.ones(5)).dtype == torch.float64


def test_krum_by_these_distances_picks_an_honest_update():
    """Blanchard et al. 2017: the least sum of the K - f - 2 smallest distances, here f = 2 of 9."""
    updates = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    updates[[2, 7]] += 10.0
    distances = squared_distances(updates).fill_diagonal_(torch.inf)
    scores = distances.sort(dim=1).values[:, : 9 - 2 - 2].sum(dim=1)
    assert scores.argmin().item() not in (2, 7)
    assert set(scores.topk(2).indices.tolist()) == {2, 7}


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.floats(0.01, 1e4))
def test_no_clipped_update_is_longer_than_the_bound_and_short_ones_are_kept(cohort, bound):
    updates, _ = cohort
    factors = clip_factors(updates, bound)
    lengths = squared_norms(updates).sqrt()
    assert (factors * lengths <= bound * (1 + 2.0**-50)).all()
    assert torch.equal(factors[lengths <= bound], torch.ones_like(factors[lengths <= bound]))
