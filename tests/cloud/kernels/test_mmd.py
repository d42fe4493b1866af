"""MMD: kernel and processor path against the definition in float64."""

import pytest
import torch
from kernel_checks import EPS32, FLUSHED, assert_within, planted, truth, value_and_gradients
from torch.func import grad, vmap
from wearfleet_cloud.kernels.mmd import (
    FIXED_GAMMAS,
    kernel,  # the Triton kernels, called directly: on a CPU they run in Triton's interpreter
    median_gammas,
    mmd,
    mmd_direct,
    mmd_reference,
)
from wearfleet_protos.errors import ShapeError

GAMMAS = torch.tensor([0.01, 0.1, 1.0])


def make(domains, windows, width, *, dtype=torch.float32, weighted=True, scale=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(domains, windows, width, generator=generator)
    features = (scale * (features + 0.3 * torch.arange(domains)[:, None, None])).to(dtype)
    weight = (torch.rand(domains, windows, generator=generator) > 0.3).float() if weighted else None
    if weight is not None:
        weight[:, 0] = 1.0
    return features, weight


def check(function, features, weight, device, gammas=GAMMAS):
    """Value and gradient within what float32 arithmetic allows.

    With features around their mean, z at most Z in norm, a squared distance errs by d = (F + 6) eps 4 Z^2. A kernel
    value errs by g d times itself plus 2 eps, so by at most sum_g (g d + 2 eps); the MMD weighs these with coefficients
    whose absolute values sum to 4. The gradient is 4 sum_j W_ij (z_i - z_j), W = c sum_g g e^-gD with relative error
    g d + 4 eps, over N terms of size at most 2 Z.
    """
    value, (slope,) = truth(mmd_reference, [features], gammas, weight)
    moved = [gammas.to(device), None if weight is None else weight.to(device)]
    found, (found_slope,) = value_and_gradients(function, [features.to(device)], *moved)
    domains, windows, width = features.shape
    exact = features.double().flatten(0, 1)
    size = (exact - exact.mean(0)).norm(dim=1).max().item()
    distance = (width + 6) * EPS32 * 4 * size**2
    scale = gammas.double()
    assert_within(
        found.float(), value, 4 * (scale * distance + 2 * EPS32).sum().clamp(max=4.0 * len(scale)), "mmd"
    )
    shares = torch.ones(domains, windows) if weight is None else weight.double()
    shares = (shares / shares.sum(1, keepdim=True))[..., None].double()
    each = (scale * (scale * distance + (4 + domains * windows) * EPS32)).sum()
    assert_within(found_slope, slope, 4 * shares * 4 * each * 2 * size + FLUSHED, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 63), (3, 21, 5), (4, 33, 130), (2, 129, 7)])
def test_the_kernel_is_the_reference(shape, device):
    check(kernel.mmd_triton, *make(*shape), device)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [257, 2049])
def test_larger_tiles_and_many_windows(windows, device, monkeypatch):
    """The tiles of more than 256 and of more than 2 048 windows, at 195 windows and slabs of 64 or fewer."""
    tiles = kernel._blocks(windows)
    monkeypatch.setattr(kernel, "_blocks", lambda _: tiles)
    check(kernel.mmd_triton, *make(3, 65 if windows > 2048 else 50, 5), device)


@pytest.mark.slow
def test_slabs_of_rows_make_the_whole_gradient(device):
    check(kernel.mmd_triton, *make(2, 65, 3), device)  # 130 rows, slabs of 64


def test_the_processor_path_is_the_reference():
    check(mmd_direct, *make(3, 17, 5), torch.device("cpu"))


@pytest.mark.parametrize("scale", [0.02, 0.2, 2.0])
def test_the_processor_path_is_the_reference_where_narrow_kernels_underflow(scale):
    check(mmd_direct, *make(4, 33, 130, scale=scale), torch.device("cpu"), torch.tensor(FIXED_GAMMAS))


def test_the_processor_path_loses_nothing_in_float64():
    """Sums of 36 squared windows and 7 kernels, and products of 832 terms; kernels of 100 underflow in float32."""
    features, weight = make(3, 12, 832, dtype=torch.float64)
    wide = [torch.tensor(FIXED_GAMMAS, dtype=torch.float64), weight.double()]
    value, (slope,) = value_and_gradients(mmd_direct, [features], *wide)
    expected, (exact,) = truth(mmd_reference, [features], *wide)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(slope, exact, rtol=1e-9, atol=1e-12)


def test_a_window_is_at_no_distance_from_itself():
    """Far from the mean, rounding of a Gram matrix would leave a distance that the narrow kernels see."""
    apart = torch.tensor([[[3e3]], [[-3e3]], [[1e4]]]) + torch.tensor([0.1, 0.7, 0.3])
    found = mmd_direct(apart, torch.tensor(FIXED_GAMMAS)).item()
    assert found == pytest.approx(2.0 * len(FIXED_GAMMAS), abs=14 * 9 * EPS32)  # 9 blocks of sums up to 14


def test_without_weights(device):
    check(kernel.mmd_triton, *make(3, 17, 5, weighted=False), device)


def test_the_published_bandwidths(device):
    check(kernel.mmd_triton, *make(3, 9, 6), device, torch.tensor(FIXED_GAMMAS))


def test_bfloat16_is_rounded_only_on_the_way_in_and_out(device):
    check(kernel.mmd_triton, *make(3, 17, 20, dtype=torch.bfloat16), device)


def test_features_that_are_not_contiguous(device):
    features, weight = make(3, 17, 5)
    check(kernel.mmd_triton, features.transpose(0, 2).contiguous().transpose(0, 2), weight, device)


def test_a_common_offset_of_ten_thousand_changes_nothing(device):
    features, weight = make(3, 17, 5)
    shifted = (features * 1024).round() / 1024 + 8192.0  # exact in float32
    found = kernel.mmd_triton(shifted.to(device), GAMMAS.to(device), weight.to(device))
    expected = mmd_reference((shifted.double() - 8192.0), GAMMAS.double(), weight.double())
    assert found.item() == pytest.approx(expected.item(), rel=5e-3)


def test_denormal_features_do_not_differ(device):
    check(kernel.mmd_triton, *make(3, 9, 5, scale=1e-40), device)


def test_of_windows_far_apart_only_those_with_themselves_are_left(device):
    """Distances of 1e7 and more: every other value of a kernel is 0. Sums of 27 shares, each of three roundings."""
    features, weight = make(3, 9, 5, scale=1e4)
    value, (slope,) = value_and_gradients(
        kernel.mmd_triton, [features.to(device)], GAMMAS.to(device), weight.to(device)
    )
    expected, (exact,) = truth(mmd_reference, [features], GAMMAS, weight)
    assert_within(value, expected, (27 + 6) * EPS32 * expected, "mmd")
    assert (slope == 0).all()
    assert (exact == 0).all()


def test_padding_may_hold_anything(device):
    features, _ = make(2, 6, 4)
    weight = torch.ones(2, 6)
    weight[:, 4:] = 0.0
    spoilt = features.clone()
    spoilt[:, 4:] = float("nan")
    value, (slope,) = value_and_gradients(
        kernel.mmd_triton, [spoilt.to(device)], GAMMAS.to(device), weight.to(device)
    )
    expected, (exact,) = truth(mmd_reference, [features[:, :4]], GAMMAS)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(slope[:, :4].cpu().double(), exact, rtol=1e-4, atol=1e-6)
    assert (slope[:, 4:] == 0).all()


@pytest.mark.parametrize("function", [kernel.mmd_triton, mmd_direct])
def test_equal_domains_have_no_discrepancy(function, device):
    features, _ = make(1, 9, 4)
    found = function(features.expand(3, -1, -1).to(device), GAMMAS.to(device))
    assert abs(found.item()) < 4 * 3 * 30 * EPS32


def test_the_order_of_domains_does_not_matter_and_the_value_has_its_bounds(device):
    features, weight = make(4, 9, 4, scale=30.0)
    order = torch.tensor([2, 0, 3, 1])
    one = kernel.mmd_triton(features.to(device), GAMMAS.to(device), weight.to(device)).item()
    two = kernel.mmd_triton(features[order].to(device), GAMMAS.to(device), weight[order].to(device)).item()
    assert one == pytest.approx(two, rel=1e-4)
    assert 0.0 <= one <= 2 * len(GAMMAS)


def test_the_reference_is_differentiable():
    features, weight = make(3, 4, 3)
    assert torch.autograd.gradcheck(
        lambda z: mmd_reference(z, GAMMAS.double(), weight.double()), features.double().requires_grad_()
    )


def test_stacked_runs_are_single_runs(device):
    runs = [make(2, 9, 5, seed=seed) for seed in range(3)]

    def slope(features, weight):
        return grad(lambda z: kernel.mmd_triton(z, GAMMAS.to(device), weight))(features)

    stacked = [torch.stack(parts).to(device) for parts in zip(*runs, strict=True)]
    found = vmap(slope)(*stacked)
    for number in range(3):
        torch.testing.assert_close(
            found[number], slope(*(part[number] for part in stacked)), rtol=1e-5, atol=1e-7
        )


def test_the_median_heuristic_fits_any_scale():
    features, _ = make(3, 17, 5)
    one, two = median_gammas(features), median_gammas(100.0 * features)
    torch.testing.assert_close(two, one / 1e4, rtol=1e-4, atol=0)
    flat = features.flatten(0, 1)
    squares = torch.pdist(flat).square()
    assert one[2].item() == pytest.approx(1.0 / squares.median().item(), rel=0.05)
    assert median_gammas(torch.zeros(2, 3, 4)).isfinite().all()


def test_padding_has_no_say_in_the_median():
    features, _ = make(3, 17, 5)
    padded = torch.cat([features, torch.full((3, 2, 5), 1e3)], dim=1)
    weight = torch.cat([torch.ones(3, 17), torch.zeros(3, 2)], dim=1)
    torch.testing.assert_close(median_gammas(padded, weight), median_gammas(features), rtol=1e-6, atol=0)
    assert median_gammas(padded, torch.zeros_like(weight)).isfinite().all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.where(column > row, 2.0, 1.0)", "2.0"),
        ("- 2.0 * products", "- 1.9 * products"),
        ("values -= gamma * tl.exp", "values -= tl.exp"),
        ("== (j // B)[None, :], inner, outer)", "!= (j // B)[None, :], inner, outer)"),
    ],
)
def test_a_planted_error_is_found(old, new, device):
    wrong = planted(kernel, old, new)
    with pytest.raises(AssertionError):
        check(wrong.mmd_triton, *make(3, 17, 5), device)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.zeros(3, 4), GAMMAS), "domains, windows, F"),
        ((torch.zeros(2, 3, 4), torch.zeros(0)), "at least one"),
        ((torch.zeros(2, 3, 4), GAMMAS, torch.zeros(3, 2)), r"weight must be \(2, 3\)"),
    ],
)
def test_bad_input_is_named(arguments, says):
    with pytest.raises(ShapeError, match=says):
        mmd(*arguments)


def test_one_domain_has_nothing_to_align():
    assert mmd(torch.zeros(1, 3, 4), GAMMAS).item() == 0.0
