"""CORAL: both kernels against the definition in float64."""

import functools

import pytest
import torch
from kernel_checks import EPS32, FLUSHED, assert_within, planted, truth, value_and_gradients
from torch.func import grad, vmap
from wearfleet_cloud.kernels.coral import (
    coral_penalty_reference,
    kernel,  # the Triton kernels, called directly: on a CPU they run in Triton's interpreter
)

FORMS = [True, False]


def make(domains, windows, width, *, dtype=torch.float32, weighted=True, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(domains, windows, width, generator=generator)
    features = (scale * (features * (1.0 + 0.2 * torch.arange(domains)[:, None, None]) + 0.3)).to(dtype)
    weight = 0.5 + torch.rand(domains, windows, generator=generator) if weighted else None
    return features, weight


def check(function, features, weight, device):
    """Value and gradient within what float32 arithmetic allows.

    A centred row x errs by (B + 4) eps max|z| sqrt(w / (W - 1)) an entry, so relatively by r = (B + 4) eps max|z| / sd.
    An inner product or a covariance is then good to (2 r + F eps) or (2 r + B eps) times the product of norms; their
    squares, added in float64, count at most 2 D / (D (D - 1)) sum |K|^2 / F^2. The gradient 4 sum_j e K_ij x_j errs by
    2 (2 r + (F + N) eps) times the sum of the sizes of its terms, at most D |K|_F |X|_F.
    """
    value, (slope,) = truth(coral_penalty_reference, [features], weight)
    moved = None if weight is None else weight.to(device)
    found, (found_slope,) = value_and_gradients(function, [features.to(device)], moved)
    domains, windows, width = features.shape
    z = features.double()
    weights = torch.ones(domains, windows, dtype=torch.float64) if weight is None else weight.double()
    total = weights.sum(1)[:, None, None]
    mean = (z * weights[..., None]).sum(1, keepdim=True) / total
    x = (z - mean) * (weights[..., None] / (total - 1)).sqrt()
    relative = (windows + 4) * EPS32 * z.abs().max() / (z - mean).square().mean().sqrt().clamp(min=1e-300)
    flat = x.flatten(0, 1)
    gram = flat.norm() ** 2
    step = 2 * relative + (width + windows * domains) * EPS32
    pairs = domains * (domains - 1) / 2
    means = domains * windows * EPS32 * 4 * z.abs().max() ** 2 / pairs * domains
    assert_within(
        found.float(), value, 2 * step * domains * gram**2 / (width**2 * pairs) + means + FLUSHED, "penalty"
    )
    reach = (weights[..., None] / (total - 1)).sqrt().max()
    bound = 2 * step * 4 * domains * gram * flat.norm() * reach / (width**2 * pairs)
    bound = (
        bound
        + 2
        * domains
        * (windows + 6)
        * EPS32
        * 2
        * z.abs().max()
        / (width * pairs)
        * (weights / total[..., 0]).max()
    )
    assert_within(found_slope, slope, bound + FLUSHED, "gradient")


def form(gram):
    return functools.partial(kernel.coral_penalty_triton, gram=gram)


@pytest.mark.parametrize("gram", FORMS)
@pytest.mark.parametrize("shape", [(2, 2, 1), (2, 3, 63), (3, 21, 33), (4, 33, 70), (2, 129, 5)])
def test_the_kernel_is_the_reference(gram, shape, device):
    check(form(gram), *make(*shape), device)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [257, 2049])
def test_larger_tiles_and_many_windows(windows, device, monkeypatch):
    """The tiles of more than 256 and of more than 2 048 windows, at 195 windows and slabs of 64 or fewer."""
    tiles = kernel._blocks(windows)
    monkeypatch.setattr(kernel, "_blocks", lambda _: tiles)
    check(form(gram=True), *make(3, 65 if windows > 2048 else 50, 5), device)


@pytest.mark.slow
def test_slabs_of_rows_make_the_whole_gradient(device):
    check(form(gram=True), *make(2, 65, 3), device)  # 130 rows, slabs of 64


@pytest.mark.parametrize("gram", FORMS)
def test_without_weights(gram, device):
    check(form(gram), *make(3, 9, 20, weighted=False), device)


@pytest.mark.parametrize("gram", FORMS)
def test_bfloat16_is_rounded_only_on_the_way_in_and_out(gram, device):
    check(form(gram), *make(3, 9, 20, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("gram", FORMS)
@pytest.mark.parametrize("scale", [1e4, 1e-6, 1e-40])
def test_extreme_features(gram, scale, device):
    check(form(gram), *make(3, 9, 20, scale=scale), device)


@pytest.mark.parametrize("gram", FORMS)
def test_features_that_are_not_contiguous(gram, device):
    features, weight = make(3, 9, 20)
    check(form(gram), features.transpose(0, 2).contiguous().transpose(0, 2), weight, device)


@pytest.mark.parametrize("gram", FORMS)
def test_padding_may_hold_anything_and_domains_may_differ_in_size(gram, device):
    features, _ = make(2, 6, 4)
    weight = torch.ones(2, 6)
    weight[0, 4:] = 0.0
    spoilt = features.clone()
    spoilt[0, 4:] = float("nan")
    value, (slope,) = value_and_gradients(form(gram), [spoilt.to(device)], weight.to(device))
    clean = features.clone()
    clean[0, 4:] = 0.0
    expected, (exact,) = truth(coral_penalty_reference, [clean], weight)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(slope.cpu().double(), exact, rtol=1e-4, atol=1e-6)
    assert (slope[0, 4:] == 0).all()


@pytest.mark.parametrize("gram", FORMS)
def test_equal_domains_cost_nothing(gram, device):
    features, _ = make(1, 9, 20)
    found = form(gram)(features.expand(3, -1, -1).to(device), None)
    assert 0.0 <= found.item() < 1e-6


@pytest.mark.parametrize("gram", FORMS)
def test_stacked_runs_are_single_runs(gram, device):
    runs = [make(2, 9, 20, seed=seed) for seed in range(3)]

    def slope(features, weight):
        return grad(lambda z: form(gram)(z, weight))(features)

    stacked = [torch.stack(parts).to(device) for parts in zip(*runs, strict=True)]
    found = vmap(slope)(*stacked)
    for number in range(3):
        torch.testing.assert_close(
            found[number], slope(*(part[number] for part in stacked)), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize(
    ("old", "new", "gram"),
    [
        ("tl.sum(counts * k * k) * tl.where(column > row, 2.0, 1.0)", "tl.sum(counts * k * k)", True),
        ("tl.load(scale + problem) * counts * k", "tl.load(scale + problem) * k", True),
        ("(z - mean), 0.0)", "z, 0.0)", True),
        ("(w / total)[:, None] * common", "w[:, None] * common", False),
        ("    mean /= D\n", "    mean /= D + 1\n", False),
        ("        tl.store(place, away, mask=entry < E)\n", "", False),
    ],
)
def test_a_planted_error_is_found(old, new, gram, device):
    wrong = planted(kernel, old, new)
    with pytest.raises(AssertionError):
        check(functools.partial(wrong.coral_penalty_triton, gram=gram), *make(3, 9, 20), device)
