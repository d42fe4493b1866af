"""Robust aggregation: kernels and slices against float64, and the laws of every rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import EPS32, assert_within, planted
from wearfleet_cloud.kernels import robust
from wearfleet_cloud.kernels.robust import (
    clip_factors,
    coordinate_median,
    finite_updates,
    kernel,  # the Triton kernels, called directly: on a CPU they run in Triton's interpreter
    median_reference,
    squared_distances,
    squared_distances_reference,
    squared_norms,
    squared_norms_reference,
    trimmed_mean,
    trimmed_mean_reference,
    weighted_mean,
    weighted_sum_reference,
)
from wearfleet_protos.errors import ConfigError, ShapeError

SHAPES = [(1, 1), (2, 3), (3, 63), (16, 129), (33, 20), (130, 9)]


def make(count, size, *, dtype=torch.float32, scale=1.0, seed=0):
    """Updates with a common part and, every third number, ties."""
    generator = torch.Generator().manual_seed(seed)
    updates = scale * (torch.randn(count, size, generator=generator) + torch.randn(size, generator=generator))
    updates[:, ::3] = updates[:, ::3].sign() * scale
    return updates.to(dtype)


def check_median(function, updates, device):
    """A median is one of the values, or half of the sum of two: one rounding, of 2^-149 among denormals."""
    exact = median_reference(updates.double())
    assert_within(function(updates.to(device)), exact, 2 * EPS32 * exact.abs() + 2.0**-148, "median")


def check_trimmed(function, updates, trim, device):
    """Added in float64 and rounded once at the end, to 2^-149 among denormals."""
    exact = trimmed_mean_reference(updates.double(), trim)
    assert_within(
        function(updates.to(device), trim),
        exact,
        2.0**-149 + 2.0**-50 * updates.double().abs().amax(0),
        "trimmed mean",
    )


def check_sum(function, updates, device):
    """K products in float64."""
    weights = torch.rand(len(updates), generator=torch.Generator().manual_seed(1)).double()
    exact = weighted_sum_reference(updates.double(), weights)
    bound = len(updates) * 2.0**-52 * (weights[:, None] * updates.double().abs()).sum(0)
    assert_within(function(updates.to(device), weights.to(device)), exact, bound, "sum")


def check_distances(function, updates, device):
    """Each difference and each square is rounded once, and 32 of them are added in float32: 36 roundings."""
    exact = squared_distances_reference(updates.double())
    assert_within(function(updates.to(device)), exact, 36 * EPS32 * exact, "distances")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_median_kernel_is_the_reference(shape, device):
    check_median(kernel.median_triton, make(*shape), device)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_trimmed_mean_kernel_is_the_reference(shape, device):
    for trim in {0, 1, shape[0] // 5, (shape[0] - 1) // 2}:
        if 2 * trim < shape[0]:
            check_trimmed(kernel.trimmed_mean_triton, make(*shape), trim, device)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_other_kernels_are_the_references(shape, device):
    updates = make(*shape)
    check_sum(kernel.weighted_sum_triton, updates, device)
    check_distances(kernel.squared_distances_triton, updates, device)
    exact = squared_norms_reference(updates.double())
    assert_within(kernel.squared_norms_triton(updates.to(device)), exact, 1e-13 * exact, "norms")


@pytest.mark.slow
def test_a_thousand_updates(device):
    updates = make(1023, 20)
    check_median(kernel.median_triton, updates, device)
    check_trimmed(kernel.trimmed_mean_triton, updates, 100, device)


@pytest.mark.parametrize("scale", [1e4, 1e-40, 1e38])
def test_extreme_values(scale, device):
    updates = make(9, 30, scale=scale).clamp(-3e38, 3e38)
    check_median(kernel.median_triton, updates, device)
    check_trimmed(kernel.trimmed_mean_triton, updates, 2, device)


def test_bfloat16_and_rows_apart(device):
    updates = make(9, 30, dtype=torch.bfloat16)
    check_median(kernel.median_triton, updates, device)
    check_sum(kernel.weighted_sum_triton, updates, device)
    check_median(kernel.median_triton, make(9, 60)[:, ::2].contiguous()[:, 5:20], device)


def test_a_coordinate_with_nan_is_nan_and_no_other(device):
    updates = make(5, 8)
    updates[2, 3] = torch.nan
    for found in (
        kernel.median_triton(updates.to(device)),
        kernel.trimmed_mean_triton(updates.to(device), 1),
    ):
        assert found.isnan().nonzero().flatten().tolist() == [3]
    assert finite_updates(updates).tolist() == [True, True, False, True, True]
    assert coordinate_median(updates).isnan().sum() == 1
    assert trimmed_mean(updates, 1).isnan().sum() == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=9),
    st.data(),
)
def test_laws_of_the_median_and_the_trimmed_mean(rows, data):
    updates = torch.tensor(rows)
    order = data.draw(st.permutations(range(len(rows))))
    trim = data.draw(st.integers(0, (len(rows) - 1) // 2))
    median, trimmed = coordinate_median(updates), trimmed_mean(updates, trim)
    torch.testing.assert_close(coordinate_median(updates[list(order)]), median)
    torch.testing.assert_close(trimmed_mean(updates[list(order)], trim), trimmed)
    torch.testing.assert_close(coordinate_median(-updates), -median)
    assert (median >= updates.amin(0)).all()
    assert (median <= updates.amax(0)).all()
    if trim == (len(rows) - 1) // 2:
        torch.testing.assert_close(trimmed, median, rtol=1e-6, atol=1e-3)


def test_outliers_in_the_minority_stay_within_the_others(device):
    updates = make(9, 30)
    spoilt = updates.clone()
    spoilt[:4] = 1e30
    for found in (kernel.median_triton(spoilt.to(device)), kernel.trimmed_mean_triton(spoilt.to(device), 4)):
        assert (found.cpu() <= updates[4:].amax(0)).all()
        assert (found.cpu() >= updates[4:].amin(0)).all()


def test_a_small_distance_between_long_updates_is_kept(device):
    base = torch.full((2, 1000), 1000.0)
    base[1] += 2.0**-10
    found = kernel.squared_distances_triton(base.to(device)).cpu()
    assert found[0, 1].item() == pytest.approx(1000 * 2.0**-20, rel=1e-6)
    assert squared_distances(base)[0, 1].item() == pytest.approx(1000 * 2.0**-20, rel=1e-6)


def test_slices_make_the_whole(monkeypatch):
    updates = make(7, 100)
    weights = torch.arange(1.0, 8.0)
    whole = [weighted_mean(updates, weights), coordinate_median(updates), trimmed_mean(updates, 2)]
    matrices = [squared_distances(updates), squared_norms(updates)]
    for name in ("_SLICE_BYTES", "_CACHE_BYTES"):
        monkeypatch.setattr(robust, name, 7 * 4 * 9)
    parts = [weighted_mean(updates, weights), coordinate_median(updates), trimmed_mean(updates, 2)]
    for ours, theirs in zip(parts, whole, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip((squared_distances(updates), squared_norms(updates)), matrices, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


def test_equal_weights_make_the_mean_and_weights_count():
    updates = make(5, 20)
    torch.testing.assert_close(weighted_mean(updates, torch.ones(5)), updates.double().mean(0).float())
    assert torch.equal(weighted_mean(updates, torch.tensor([0.0, 0, 1, 0, 0])), updates[2])
    assert weighted_mean(updates.double(), torch.ones(5)).dtype == torch.float64


def test_clipped_updates_have_the_bound_as_their_length():
    updates = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    factors = clip_factors(updates, 1.0)
    torch.testing.assert_close(factors, torch.tensor([0.2, 1.0, 1.0]).double())
    found = weighted_mean(updates, torch.ones(3), factors=factors)
    torch.testing.assert_close(found, torch.tensor([0.9, 1.2]) / 3)


def test_distances_are_symmetric_with_nothing_on_the_diagonal():
    found = squared_distances(make(9, 40))
    assert torch.equal(found, found.T)
    assert (found.diagonal() == 0).all()


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("equal > K // 2", "equal >= K // 2", lambda k, d: check_median(k.median_triton, make(16, 33), d)),
        ("below <= rank", "below < rank", lambda k, d: check_median(k.median_triton, make(9, 33), d)),
        ("(K - 1) // 2", "K // 2 - 1", lambda k, d: check_median(k.median_triton, make(9, 33), d)),
        (
            "K - trim - tl.sum",
            "K - 1 - trim - tl.sum",
            lambda k, d: check_trimmed(k.trimmed_mean_triton, make(9, 33), 2, d),
        ),
        ("weights + row, mask=row < K", "weights + row, mask=row < K - 1", lambda k, d: check_sum(k.weighted_sum_triton, make(9, 33), d)),  # noqa: E501
        ("away = a[:, None, :] - b", "away = a[:, None, :] - 0.999 * b",
         lambda k, d: check_distances(k.squared_distances_triton, make(9, 33), d)),
    ],
)  # fmt: skip
def test_a_planted_error_is_found(old, new, check, device):
    wrong = planted(kernel, old, new)
    with pytest.raises(AssertionError):
        check(wrong, device)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: coordinate_median(torch.zeros(3)), ShapeError, "clients, parameters"),
        (lambda: coordinate_median(torch.zeros(3, 4, dtype=torch.int64)), ShapeError, "float"),
        (lambda: trimmed_mean(torch.zeros(4, 2), 2), ConfigError, "0 to 1 can be trimmed"),
        (lambda: weighted_mean(torch.zeros(4, 2), torch.zeros(4)), ConfigError, "positive sum"),
        (lambda: weighted_mean(torch.zeros(4, 2), torch.ones(3)), ShapeError, r"weights must be \(4,\)"),
        (lambda: clip_factors(torch.zeros(4, 2), 0.0), ConfigError, "above 0"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
