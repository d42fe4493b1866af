"""Robust aggregation: kernels, slices and processor against float64, and planted errors; the laws are beside this."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
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

EPS64 = 2.0**-53
TINY = 2.0**-149  # the smallest float32; halving a number may round by half of it
# Sorted in a thread up to 64, then selected; 17, 33 and 63 leave rows of the network empty.
SHAPES = [(1, 1), (2, 3), (3, 63), (16, 129), (17, 20), (33, 20), (63, 2), (64, 9), (65, 9), (129, 70)]
MEDIANS = [kernel.median_triton, coordinate_median]
TRIMMED = [kernel.trimmed_mean_triton, trimmed_mean]
DISTANCES = [kernel.squared_distances_triton, squared_distances]
NORMS = [kernel.squared_norms_triton, squared_norms]


def make(count, size, *, dtype=torch.float32, scale=1.0, seed=0):
    """Updates with a common part and, every third number, ties."""
    generator = torch.Generator().manual_seed(seed)
    updates = scale * (torch.randn(count, size, generator=generator) + torch.randn(size, generator=generator))
    updates[:, ::3] = updates[:, ::3].sign() * scale
    return updates.to(dtype)


def check_median(function, updates, device):
    """One of the values exactly, or half of the sum of two: each half and their sum are rounded once."""
    exact = median_reference(updates.double())
    found = function(updates.to(device))
    assert_within(found, exact, TINY, "median")
    if len(updates) % 2:
        assert torch.equal(found.double().cpu(), exact)


def check_trimmed(function, updates, trim, device):
    """At most K values added and divided in float64, here and in the reference, and rounded once at the end."""
    exact = trimmed_mean_reference(updates.double(), trim)
    bound = 2 * (len(updates) + 1) * EPS64 * updates.double().abs().amax(0) + TINY
    assert_within(function(updates.to(device), trim), exact, bound, "trimmed mean")


def check_sum(updates, device, *, module=kernel):
    """K products added in float64, here and in the reference."""
    weights = torch.rand(len(updates), generator=torch.Generator().manual_seed(1)).double()
    exact = weighted_sum_reference(updates.double(), weights)
    bound = 2 * (len(updates) + 1) * EPS64 * (weights[:, None] * updates.double().abs()).sum(0) + TINY
    assert_within(module.weighted_sum_triton(updates.to(device), weights.to(device)), exact, bound, "sum")
    found = weighted_mean(updates.to(device), weights.to(device)) * weights.sum().to(device)
    rounded = 2 * EPS32 * exact.abs() + TINY * weights.sum()  # once as a mean, once here
    assert_within(found, exact, bound + rounded, "mean")


def check_distances(function, updates, device):
    """In units of float32 roundings: a difference 1, squared 3; 64 added by one lane, then 31 lanes.

    A square below 2^-149 is lost, and float64 adds P terms here and there.
    """
    exact = squared_distances_reference(updates.double())
    bound = (3 + 64 + 31) * EPS32 * exact + updates.shape[1] * (TINY + 2 * EPS64 * exact)
    found = function(updates.to(device))
    assert_within(found, exact, bound, "distances")
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert (found.diagonal() == 0).all()


def check_norms(function, updates, device):
    """P squares added in float64; a square root and its square."""
    exact = squared_norms_reference(updates.double())
    assert_within(function(updates.to(device)), exact, 2 * (updates.shape[1] + 4) * EPS64 * exact, "norms")


def trims(count):
    return sorted({0, min(1, (count - 1) // 2), count // 5, (count - 1) // 2})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", MEDIANS)
def test_the_median_is_the_reference(function, shape, device):
    check_median(function, make(*shape), device)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", TRIMMED)
def test_the_trimmed_mean_is_the_reference(function, shape, device):
    for trim in trims(shape[0]):
        check_trimmed(function, make(*shape), trim, device)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sums_are_the_references(shape, device):
    updates = make(*shape)
    check_sum(updates, device)
    for function in NORMS:
        check_norms(function, updates, device)
    for function in DISTANCES:
        check_distances(function, updates, device)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1023, 20), (4096, 9), (7, 1023), (1023, 1)])
def test_many_updates_and_many_parameters(shape, device):
    updates = make(*shape)
    check_median(kernel.median_triton, updates, device)
    check_trimmed(kernel.trimmed_mean_triton, updates, shape[0] // 5, device)
    check_sum(updates, device)
    if shape[0] < 1000:
        check_distances(kernel.squared_distances_triton, updates, device)


def test_more_updates_than_a_program_holds(device):
    updates = make(4097, 3)
    check_median(coordinate_median, updates, device)
    check_trimmed(trimmed_mean, updates, 819, device)


@pytest.mark.parametrize("count", [10, 12, 14, 20, 24, 28, 40, 48, 56])
def test_a_network_of_every_length_sorts_zeros_and_ones(count, device):
    """A network of comparisons that sorts all columns of zeros and ones sorts all columns (zero-one principle)."""
    columns = torch.arange(1 << min(count, 10))  # all of them to 10 rows, then random ones
    updates = ((columns >> torch.arange(min(count, 10))[:, None]) & 1).float()
    if count > 10:
        updates = (torch.rand(count, 128, generator=torch.Generator().manual_seed(count)) < 0.5).float()
    for trim in {0, 1, count // 3, (count - 1) // 2}:
        check_trimmed(kernel.trimmed_mean_triton, updates, trim, device)
    check_median(kernel.median_triton, updates, device)
    check_median(kernel.median_triton, updates[:-1], device)


@pytest.mark.parametrize("count", [9, 10, 65, 66])
@pytest.mark.parametrize("scale", [1e4, 1e-40, 2.0**-149, 1e38])
def test_extreme_values(scale, count, device):
    updates = make(count, 30, scale=scale).clamp(-3e38, 3e38)
    for function in MEDIANS:
        check_median(function, updates, device)
    for function in TRIMMED:
        check_trimmed(function, updates, 2, device)
    check_sum(updates.clamp(-3e36, 3e36), device)


@pytest.mark.parametrize("scale", [1e4, 1e-15, 1e-40, 1e15])
def test_distances_of_extreme_values(scale, device):
    for function in DISTANCES:
        check_distances(function, make(9, 30, scale=scale), device)
    for function in NORMS:
        check_norms(function, make(9, 30, scale=scale), device)


@pytest.mark.parametrize("count", [9, 70])
def test_bfloat16_and_rows_that_lie_apart(count, device):
    narrow = make(count, 30, dtype=torch.bfloat16)
    apart = make(count, 60)[:, 5:20]
    for updates in (narrow, apart, make(60, count).T[:, 5:20], make(1, 8).expand(count, 8)):
        for function in MEDIANS:
            check_median(function, updates if updates.stride(1) == 1 else updates.contiguous(), device)
        check_median(coordinate_median, updates, device)
        check_trimmed(trimmed_mean, updates, 2, device)
        check_sum(updates.contiguous(), device)
        check_distances(squared_distances, updates, device)
    check_distances(kernel.squared_distances_triton, narrow, device)
    check_norms(kernel.squared_norms_triton, narrow, device)


@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # infinite less infinite, in the interpreter
@pytest.mark.parametrize("count", [5, 6, 67, 68])
def test_nan_spoils_its_coordinate_alone_and_infinite_values_are_ordered(count, device):
    updates = make(count, 8)
    updates[2, 3] = torch.nan
    updates[0, 3] = -torch.nan
    updates[0, 4], updates[1, 4] = math.inf, -math.inf
    updates[:, 5] = -math.inf
    updates[:, 6] = math.inf
    updates[: count - 1, 7] = math.inf
    updates[1, 0] = -math.inf
    trim = (count - 1) // 2
    for function in MEDIANS:
        found = function(updates.to(device)).cpu()
        torch.testing.assert_close(found, median_reference(updates), rtol=1e-6, atol=0, equal_nan=True)
    for function in TRIMMED:
        for cut in (0, trim):
            exact = trimmed_mean_reference(updates.double(), cut).float()
            torch.testing.assert_close(
                function(updates.to(device), cut).cpu(), exact, rtol=1e-6, atol=1e-6, equal_nan=True
            )
    assert coordinate_median(updates).isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_updates_that_are_not_finite_are_named(dtype, device):
    updates = make(5, 3000, dtype=dtype)
    assert finite_updates(updates.to(device)).all()
    updates[1, 2999], updates[3, 0], updates[4, 5] = math.inf, math.nan, torch.finfo(dtype).max
    assert finite_updates(updates.to(device)).tolist() == [True, False, True, False, True]
    assert squared_norms(updates.to(device)).isfinite().tolist()[:4] == [True, False, True, False]


def test_a_small_distance_between_long_updates_is_kept(device):
    base = torch.full((2, 1000), 1000.0)
    base[1] += 2.0**-10
    for function in DISTANCES:
        assert function(base.to(device))[0, 1].item() == pytest.approx(1000 * 2.0**-20, rel=98 * EPS32)


def test_distances_of_many_chunks_and_launches_are_those_of_one(monkeypatch, device):
    updates = make(20, 200)
    monkeypatch.setattr(kernel, "_CHUNK", 32)
    monkeypatch.setattr(kernel, "_LAUNCH", 8)  # two chunks of 2 x 2 tiles
    check_distances(kernel.squared_distances_triton, updates, device)


def test_slices_make_the_whole(monkeypatch, device):
    updates = make(7, 100)
    weights = torch.arange(1.0, 8.0)

    def results():
        columns = (weighted_mean(updates, weights, device=device), coordinate_median(updates, device=device),
                   trimmed_mean(updates, 2, device=device))  # fmt: skip
        return columns, (squared_distances(updates, device=device), squared_norms(updates, device=device))

    whole, matrices = results()
    for name in ("_SLICE_BYTES", "_CACHE_BYTES"):
        monkeypatch.setattr(robust, name, 7 * 4 * 9)
    assert [part.shape[1] for part in robust._slices(updates, updates.device)] == [9] * 11 + [1]
    parts, sums = results()
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours.device == updates.device
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(sums, matrices, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=40 * EPS32, atol=0)
    check_median(coordinate_median, updates.double(), device)


def test_tensors_of_triton_go_to_its_kernels_in_one_piece(monkeypatch, device):
    """What runs on a GPU, here with a rule of dispatch that says yes to everything."""
    monkeypatch.setattr(robust, "takes_triton", lambda *_: True)
    monkeypatch.setattr(robust, "_SLICE_BYTES", 1)
    monkeypatch.setattr(robust, "_CACHE_BYTES", 1)
    for name in ("median", "trimmed_mean", "squared_distances", "squared_norms", "weighted_sum"):
        monkeypatch.setattr(robust, f"{name}_direct", None)
    updates = make(6, 33)
    assert len(list(robust._slices(updates, None))) == 1
    check_median(coordinate_median, updates, device)
    check_trimmed(trimmed_mean, updates, 2, device)
    check_sum(updates, device)
    check_distances(squared_distances, updates, device)
    check_norms(squared_norms, updates, device)


def test_many_slices_take_no_more_memory_than_one(device):
    """A hundred slices of 4 096 updates: 1 MiB each and 2 MiB in float64, which must make room for each other."""
    updates = torch.zeros(1, 1).expand(4096, 64 * 100)
    assert [part.shape[1] for part in robust._slices(updates, updates.device)] == [64] * 100
    for call in (lambda: weighted_mean(updates, torch.ones(4096)), lambda: coordinate_median(updates)):
        before = _own_mebibytes()
        call()
        assert _own_mebibytes() - before < 32


def _own_mebibytes():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells what a process takes")
    return int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1]) / 1024


def test_updates_stay_in_a_mapped_file(tmp_path, device):
    updates = make(5, 300_000)
    np.save(tmp_path / "updates.npy", updates.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "updates.npy", mmap_mode="c"))
    slices = list(robust._slices(mapped, mapped.device))
    assert len(slices) == math.ceil(300_000 * 5 * 4 / 2**20)
    assert torch.equal(coordinate_median(mapped, device=device), coordinate_median(updates))
    assert finite_updates(mapped, device=device).all()


def test_clipped_updates_have_the_bound_as_their_length():
    updates = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    factors = clip_factors(updates, 1.0)
    torch.testing.assert_close(factors, torch.tensor([0.2, 1.0, 1.0]).double())
    found = weighted_mean(updates, torch.ones(3), factors=factors)
    torch.testing.assert_close(found, torch.tensor([0.9, 1.2]) / 3)
    assert clip_factors(torch.tensor([[math.inf, 1.0], [math.nan, 1.0]]), 1.0)[0] == 0
    assert clip_factors(torch.tensor([[math.nan, 1.0]]), 1.0).isnan().all()


def _median(count):
    return lambda k, d: check_median(k.median_triton, make(count, 33), d)


def _trimmed(count):
    return lambda k, d: check_trimmed(k.trimmed_mean_triton, make(count, 33), 2, d)


def _sum(k, device):
    check_sum(make(9, 33), device, module=k)


def _norms(k, device):
    check_norms(k.squared_norms_triton, make(9, 33), device)


def _distances(count):
    return lambda k, d: check_distances(k.squared_distances_triton, make(count, 33), d)


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("(low - begin) // apart % 2 == 0", "(low - begin) // apart % 2 == 1", _median(9)),
        ("row // (2 * run) == other", "row // run == other", _median(12)),
        ("tl.maximum(rows[k - APART], rows[k])", "tl.minimum(rows[k - APART], rows[k])", _median(9)),
        ("k >= ROWS - ROWS // 4:", "k > ROWS:", _median(33)),
        ("k == K // 2", "k == (K + 1) // 2", _median(9)),
        ("k < K - trim", "k <= K - trim", _trimmed(9)),
        ("total / (K - 2 * trim)).to(tl.float32)\n    tl", "total / (K - trim)).to(tl.float32)\n    tl", _trimmed(9)),
        ("0.5 * first + 0.5 * second", "0.5 * first + 0.499 * second", _median(10)),
        ("values >= bound", "values > bound", _median(65)),
        ("(key >> 31) & 0x7FFFFFFF", "(key >> 31) & 0x7FFFFFFE", _median(65)),
        ("(K - rank)", "(K - rank - 1)", _median(65)),
        ("until > K // 2", "until >= K // 2", _median(66)),
        ("K - 1 - trim, K)", "K - 2 - trim, K)", _trimmed(65)),
        ("last[None, :]).to(tl.int32), 0) - trim", "last[None, :]).to(tl.int32), 0)", _trimmed(65)),
        ("weights + row, mask=row < K", "weights + row, mask=row < K - 1", _sum),
        ("away = a - b", "away = a - 0.999 * b", _distances(9)),
        ("mask=has_j & (column < P)", "mask=has_j & (column < P - 1)", _distances(9)),
        ("i[:, None], total, mask", "i[:, None], 1.01 * total, mask", _distances(20)),
        ("column, mask=column < P, other=0.0)", "column, mask=column < P - 1, other=0.0)", _norms),
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
        (lambda: coordinate_median(torch.zeros(3, 0)), ShapeError, "at least one each"),
        (lambda: coordinate_median(torch.zeros(3, 4, dtype=torch.int64)), ShapeError, "float"),
        (lambda: trimmed_mean(torch.zeros(4, 2), 2), ConfigError, "0 to 1 can be trimmed"),
        (lambda: trimmed_mean(torch.zeros(4, 2), -1), ConfigError, "0 to 1 can be trimmed"),
        (lambda: weighted_mean(torch.zeros(4, 2), torch.zeros(4)), ConfigError, "positive sum"),
        (lambda: weighted_mean(torch.zeros(2, 2), torch.tensor([2.0, -1])), ConfigError, "not negative"),
        (lambda: weighted_mean(torch.zeros(2, 2), torch.tensor([2.0, math.nan])), ConfigError, "finite"),
        (lambda: weighted_mean(torch.zeros(2, 2), torch.tensor([2.0, math.inf])), ConfigError, "finite"),
        (lambda: weighted_mean(torch.zeros(4, 2), torch.ones(3)), ShapeError, r"weights must be \(4,\)"),
        (lambda: clip_factors(torch.zeros(4, 2), 0.0), ConfigError, "above 0"),
        (lambda: clip_factors(torch.zeros(4, 2), math.nan), ConfigError, "above 0"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
