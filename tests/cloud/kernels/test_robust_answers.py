"""Known answers of robust aggregation, on the public functions and the kernels."""

import pytest
import torch
from wearfleet_cloud.kernels.robust import (
    coordinate_median,
    kernel,
    squared_distances,
    trimmed_mean,
    weighted_mean,
)

MEDIANS = [kernel.median_triton, coordinate_median]
TRIMMED = [kernel.trimmed_mean_triton, trimmed_mean]


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
