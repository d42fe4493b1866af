"""Gradient variance: kernel and closed form against the variance of written-out gradients in float64."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from kernel_checks import EPS32, assert_within, planted, result_and_gradients, truth, value_and_gradients
from torch.func import grad, vmap
from wearfleet_cloud.kernels.gradient_variance import (
    fishr_penalty,
    gradient_variance,
    gradient_variance_closed,
    gradient_variance_reference,
    kernel,  # the Triton kernels, called directly: on a CPU they run in Triton's interpreter
    moving_variance,
)
from wearfleet_protos.errors import ConfigError, ShapeError

FUNCTIONS = pytest.mark.parametrize("function", [kernel.gradient_variance_triton, gradient_variance_closed])
SHAPES = [(1, 1, 1, 1), (1, 2, 63, 2), (3, 63, 17, 6), (2, 33, 64, 19), (2, 33, 129, 3)]


def make(domains, windows, width, classes, *, dtype=torch.float32, weighted=True, scale=1.0, seed=0):
    """Features and logits, labels, weights and a gradient for every variance, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    features = (scale * torch.randn(domains, windows, width, generator=generator)).to(dtype)
    logits = (2 * torch.randn(domains, windows, classes, generator=generator)).to(dtype)
    labels = torch.randint(0, classes, (domains, windows), generator=generator)
    weight = (torch.rand(domains, windows, generator=generator) > 0.3).float() if weighted else None
    upstream = torch.randn(domains, classes, width + 1, generator=generator)
    return (features, logits), (labels, weight), upstream


def weighing(function, upstream):
    """The sum of the variances, each times its own number: a gradient that no two share."""
    return lambda *values: (function(*values) * upstream.to(values[0].device, values[0].double().dtype)).sum()


def check(function, problem, device):
    """Variances and gradients within what float32 arithmetic allows.

    r is good to d = (K + 8 + 4 max|l|) eps relative to 1. A variance subtracts two sums of B products with terms up to
    max(z, 1)^2: error (2 B + 6) eps + 4 d times max z^2. By z: a sum over K of u r^2 z and u r mean; by the logits: a
    sum over F + 1 of u (r z^2 - mean z) and then over K of p times that. Each sum of n terms adds n eps relative to
    its terms.
    """
    leaves, others, upstream = problem
    features, logits = leaves
    _, windows, width = features.shape
    classes = logits.shape[-1]
    exact = [t.double() for t in leaves]
    value = gradient_variance_reference(*exact, *[None if t is None else t for t in others])
    _, gradients = truth(weighing(gradient_variance_reference, upstream), leaves, *others)
    placed = [t.to(device) for t in leaves]
    moved = [None if t is None else t.to(device) for t in others]
    found, found_gradients = result_and_gradients(function, upstream, placed, *moved)
    residual = EPS32 * (classes + 8 + 4 * logits.double().abs().max().item())
    z = max(1.0, features.double().abs().max().item())
    assert_within(found.float(), value, z**2 * (EPS32 * (2 * windows + 6) + 4 * residual), "variance")
    weight = torch.ones(features.shape[:2]) if others[1] is None else others[1]
    share = (weight.double() / weight.double().sum(1, keepdim=True).clamp(min=1e-12))[..., None]
    u = upstream.abs().max().item()
    by_z = 2 * share * u * z * classes * 2 * (2 * residual + EPS32 * (2 * windows + classes + 8))
    terms = (width + 1) * u * z**2 * 2
    by_l = 2 * share * terms * (2 * (2 * residual + EPS32 * (2 * windows + width + 8)) + classes * EPS32)
    for gradient, expected, bound in zip(found_gradients, gradients, (by_z, by_l), strict=True):
        assert_within(gradient, expected, bound, "gradient")


@pytest.mark.slow
@FUNCTIONS
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fast_ways_are_the_reference(shape, function, device):
    check(function, make(*shape), device)


@pytest.mark.slow
def test_the_kernel_is_the_reference_for_many_windows(device):
    check(kernel.gradient_variance_triton, make(2, 97, 40, 6), device)  # beyond 64 a tile has 32 windows


@FUNCTIONS
def test_without_weights(function, device):
    check(function, make(3, 33, 17, 6, weighted=False), device)


@FUNCTIONS
def test_bfloat16_is_rounded_only_on_the_way_in_and_out(function, device):
    check(function, make(2, 33, 17, 6, dtype=torch.bfloat16), device)


@FUNCTIONS
@pytest.mark.parametrize("scale", [1e4, 1e-40])
def test_extreme_features(scale, function, device):
    check(function, make(2, 17, 9, 4, scale=scale), device)


@FUNCTIONS
def test_extreme_logits(function, device):
    (features, logits), others, upstream = make(2, 17, 9, 4)
    check(function, ((features, 1e4 * logits), others, upstream), device)


@FUNCTIONS
def test_features_that_are_not_contiguous(function, device):
    (features, logits), others, upstream = make(2, 17, 9, 4)
    other = features.transpose(0, 2).contiguous().transpose(0, 2)
    check(function, ((other, logits), others, upstream), device)


@FUNCTIONS
def test_padding_may_hold_anything(function, device):
    (features, logits), (labels, _), upstream = make(2, 6, 5, 3)
    weight = torch.ones(2, 6)
    weight[:, 4:] = 0.0
    spoilt = [t.clone() for t in (features, logits)]
    for tensor in spoilt:
        tensor[:, 4:] = float("nan")
    value, gradients = value_and_gradients(
        lambda *v: (function(*v) * upstream.to(device)).sum(),
        [t.to(device) for t in spoilt],
        labels.to(device),
        weight.to(device),
    )
    expected, exact = truth(
        weighing(gradient_variance_reference, upstream), [features[:, :4], logits[:, :4]], labels[:, :4], None
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    for gradient, wanted in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient[:, :4].cpu().double(), wanted, rtol=1e-4, atol=1e-5)
        assert (gradient[:, 4:] == 0).all()


@FUNCTIONS
def test_a_domain_without_weight_and_a_class_without_windows(function, device):
    (features, logits), _, _ = make(2, 6, 5, 4)
    labels, weight = torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6)
    weight[0] = 0.0
    found = function(features.to(device), logits.to(device), labels.to(device), weight.to(device))
    assert (found[0] == 0.0).all()
    assert (found[1] > 0.0).all()


def test_the_reference_is_the_variance_of_gradients_by_autograd():
    (features, _), (labels, _), _ = make(2, 5, 3, 4, weighted=False)
    generator = torch.Generator().manual_seed(1)
    weights, bias = (
        torch.randn(4, 3, generator=generator).double(),
        torch.randn(4, generator=generator).double(),
    )
    z = features.double()

    def loss(w, b, window, label):
        return F.cross_entropy(window @ w.T + b, label)

    per_window = vmap(vmap(grad(loss, (0, 1)), (None, None, 0, 0)), (None, None, 0, 0))
    by_weights, by_bias = per_window(weights, bias, z, labels)
    expected = torch.cat([by_weights, by_bias[..., None]], -1).var(1, correction=0)
    found = gradient_variance_reference(z, z @ weights.T + bias, labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_reference_is_differentiable():
    leaves, (labels, weight), _ = make(2, 4, 3, 3)
    leaves = tuple(leaf.double().requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(
        lambda z, logits: gradient_variance_reference(z, logits, labels, weight.double()), leaves
    )


def test_equal_domains_cost_nothing_and_one_domain_neither():
    leaves, (labels, _), _ = make(1, 9, 5, 3)
    found = gradient_variance(*(t.expand(3, -1, -1) for t in leaves), labels.expand(3, -1))
    assert fishr_penalty(found).item() < EPS32**2
    assert fishr_penalty(found[:1]).item() == 0.0


def test_the_moving_average_of_equal_batches_fills_up_by_the_power_of_its_decay():
    leaves, (labels, weight), _ = make(2, 9, 5, 3)
    variances = gradient_variance(*(t.double() for t in leaves), labels, weight).requires_grad_()
    average = torch.zeros_like(variances)
    for _ in range(7):
        average = moving_variance(average, variances, 0.9)
    torch.testing.assert_close(average, (1 - 0.9**7) * variances, rtol=1e-12, atol=1e-15)
    (slope,) = torch.autograd.grad((average / (1 - 0.9)).sum(), variances)
    torch.testing.assert_close(slope, torch.ones_like(slope), rtol=1e-12, atol=0)


def test_the_order_of_domains_does_not_matter():
    leaves, (labels, weight), _ = make(4, 9, 5, 3)
    found = gradient_variance(*(t.double() for t in leaves), labels, weight)
    torch.testing.assert_close(fishr_penalty(found.flip(0)), fishr_penalty(found), rtol=1e-12, atol=0)


@FUNCTIONS
def test_stacked_runs_are_single_runs(function, device):
    runs = [make(2, 9, 5, 3, seed=seed) for seed in range(3)]

    def gradients(z, logits, labels, weight):
        return grad(lambda a, b: fishr_penalty(function(a, b, labels, weight)), (0, 1))(z, logits)

    tensors = [tuple(t.to(device) for t in (*leaves, *others)) for leaves, others, _ in runs]
    found = vmap(gradients)(*(torch.stack(parts) for parts in zip(*tensors, strict=True)))
    for number, values in enumerate(tensors):
        for ours, theirs in zip(found, gradients(*values), strict=True):
            torch.testing.assert_close(ours[number], theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("squares - means * means", "squares - 0.999 * means * means"),
        ("tl.dot(tl.trans(r * w[:, None]), z, means", "tl.dot(tl.trans(r * r * w[:, None]), z, means"),
        ("(columns == F), 1.0, z)", "(columns == F), 1.001, z)"),
        ('- tl.dot(r, um, input_precision="ieee")', '- 0.999 * tl.dot(r, um, input_precision="ieee")'),
        ("(r * own - common)", "(r * own - 0.5 * common)"),
        ("p * (by_r - tl.sum(p * by_r, 1)[:, None])", "p * by_r"),
    ],
)
def test_a_planted_error_is_found(old, new, device):
    wrong = planted(kernel, old, new)
    with pytest.raises(AssertionError):
        check(wrong.gradient_variance_triton, make(2, 17, 9, 4), device)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"features": torch.zeros(4, 3)}, "domains, windows, F"),
        ({"labels": torch.zeros(2, 5, dtype=torch.int64)}, r"labels must begin with \(2, 4\)"),
        ({"weight": torch.zeros(2)}, "weight must begin"),
        ({"logits": torch.zeros(2, 3, 5)}, "logits must begin"),
    ],
)
def test_bad_input_is_named(change, says):
    arguments = {
        "features": torch.zeros(2, 4, 3),
        "logits": torch.zeros(2, 4, 5),
        "labels": torch.zeros(2, 4, dtype=torch.int64),
    }
    with pytest.raises(ShapeError, match=says):
        gradient_variance(**(arguments | change))


@pytest.mark.parametrize(
    ("previous", "decay", "error", "says"),
    [((2, 3, 4), 0.9, ShapeError, "must be as variances"), ((2, 3, 5), 1.0, ConfigError, "below 1")],
)
def test_a_moving_average_that_cannot_be_is_named(previous, decay, error, says):
    with pytest.raises(error, match=says):
        moving_variance(torch.zeros(previous), torch.zeros(2, 3, 5), decay)
