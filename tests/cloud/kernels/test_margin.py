"""Margin losses: kernels and closed form against norms by autograd in float64."""

import math
from itertools import pairwise

import pytest
import torch
from kernel_checks import EPS32, assert_within, planted, result_and_gradients, truth, value_and_gradients
from torch.func import grad, vmap
from wearfleet_cloud.kernels.margin import (
    AGGREGATIONS,
    additive_angular,
    kernel,  # the Triton kernels, called directly: on a CPU they run in Triton's interpreter
    large_margin,
    large_margin_closed,
    large_margin_reference,
    large_margin_softmax,
    replaced_cross_entropy_reference,
)
from wearfleet_protos.errors import ConfigError, ShapeError

FUNCTIONS = pytest.mark.parametrize("function", [kernel.large_margin_triton, large_margin_closed])


def make(windows, classes, labels=2, *, width=5, dtype=torch.float32, scale=1.0, seed=0):
    """Logits, the classifier's Gram matrix, labels, and a gradient for every loss."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(windows, width, generator=generator)
    weight = torch.randn(classes, width, generator=generator)
    logits = (scale * (features @ weight.T)).to(dtype)
    wanted = torch.randint(0, classes, (windows, labels), generator=generator)
    return logits, weight @ weight.T, wanted, torch.randn(windows, labels, generator=generator)


def conditions(logits, gram, labels, top_k, floor):
    """Of every window and label, over its rivals: largest growth of errors, smallest max(norm, floor); float64.

    The growth is the sum of the sizes of all terms of a squared norm, each product of two rows of the classifier
    counted as what it is computed from, over max(norm, floor)^2.
    """
    p, gram = torch.softmax(logits.double(), -1), gram.double()
    top = p.argmax(1)
    at = gram[top]
    size = gram.abs() + (at.abs()[:, :, None] + at.abs()[:, None] + gram.diagonal()[top][:, None, None])
    exact = gram - at[:, :, None] - at[:, None] + gram.diagonal()[top][:, None, None]
    live = (torch.arange(p.shape[1]) != top[:, None]).double()  # the row that is the origin has no size
    size = size * live[:, :, None] * live[:, None]
    growths, norms = [], []
    for label in labels.unbind(1):
        one = torch.nn.functional.one_hot(label, p.shape[1]).double()
        own = p.gather(1, label[:, None])
        slope = own[..., None] * (one - p)[:, None] - p[..., None] * (torch.eye(p.shape[1]) - p[:, None])
        square = torch.einsum("nkc,ncd,nkd->nk", slope, exact, slope)
        parts = own[..., None] * one[:, None] + p[..., None] * torch.eye(p.shape[1])
        parts = parts + (own - p).abs()[..., None] * p[:, None]
        terms = torch.einsum("nkc,ncd,nkd->nk", parts, size, parts)
        rivals = p.scatter(1, label[:, None], -1.0).topk(top_k, 1).indices
        norm = square.gather(1, rivals).clamp(min=0).sqrt().clamp(min=max(floor, 1e-8))
        growths.append((terms.gather(1, rivals) / norm.square()).max(1).values)
        norms.append(norm.min(1).values)
    return torch.stack(growths, 1), torch.stack(norms, 1)


def check(function, problem, settings, device):
    """Loss and gradient within what float32 arithmetic allows.

    The probabilities are good to d = (K + 8 + 4 max|l|) eps, relatively. A squared norm is a sum of products of two
    of them and a product of two rows, with sums of K terms: it errs by 2 d + (2 K + 10) eps times the sum of the
    sizes of its terms, the norm relatively by half of that times ``conditions``. A distance is at most 1 / norm, and
    errs by that times the error of the norm and 2 d; its gradient p (v - p v), |v| at most J |u| / norm, likewise,
    with K more roundings, all times p (or the smallest number of float32 where p underflows).
    """
    logits, gram, labels, upstream = problem
    gamma, top_k, aggregation, floor = settings
    top_k = min(top_k, logits.shape[1] - 1)
    numbers = (gamma, top_k, aggregation, floor)

    def exact_sum(x):
        return (large_margin_closed(x, gram.double(), labels, *numbers) * upstream).sum()

    exact = large_margin_closed(logits.double(), gram.double(), labels, *numbers)
    _, (slope,) = truth(exact_sum, [logits])
    placed = [tensor.to(device) for tensor in (logits, gram, labels)]
    found, (found_slope,) = result_and_gradients(function, upstream, placed[:1], *placed[1:], *numbers)
    classes = logits.shape[1]
    step = EPS32 * (classes + 8 + 4 * logits.double().abs().max().item())
    growth, norm = conditions(logits, gram, labels, top_k, floor)
    error = (0.5 * growth * (2 * step + (2 * classes + 10) * EPS32) + 2 * step) / norm
    assert_within(found.float(), exact, error, "loss")
    by_label = upstream.abs() * (error + (step + classes * EPS32) / norm)
    p = torch.softmax(logits.double(), -1)
    assert_within(found_slope, slope, 2 * p * by_label.sum(1, keepdim=True) + 2.0**-126, "gradient")


@pytest.mark.slow
@FUNCTIONS
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 3, 2), (63, 6, 2), (33, 19, 2)])
def test_float32_is_the_closed_form_in_float64(aggregation, shape, function, device):
    check(function, make(*shape), (10.0, 2, aggregation, 0.0), device)


@pytest.mark.parametrize("classes", [17, kernel.MOST_CLASSES])
def test_many_classes(classes, device):
    check(kernel.large_margin_triton, make(9, classes), (10.0, 5, "mean", 0.0), device)


@pytest.mark.slow
def test_many_windows(device):
    check(kernel.large_margin_triton, make(129, 6), (10.0, 2, "mean", 0.0), device)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_clip_stops_the_gradient(aggregation, device):
    logits, gram, labels, _ = make(33, 6)
    check(kernel.large_margin_triton, make(33, 6), (0.05, 3, aggregation, 0.0), device)
    found = kernel.large_margin_triton(
        logits.to(device), gram.to(device), labels.to(device), 0.05, 3, aggregation, 0.0
    )
    assert found.min() >= -0.05 - 1e-6
    assert found.max() <= 0.15 + 1e-6


@FUNCTIONS
def test_bfloat16_is_rounded_only_on_the_way_in_and_out(function, device):
    check(function, make(33, 6, dtype=torch.bfloat16), (10.0, 2, "mean", 0.0), device)


@FUNCTIONS
@pytest.mark.parametrize("scale", [2.0, 4.0, 8.0])
def test_a_sure_softmax_costs_no_digits(scale, function, device):
    """1 - p down to 1e-20; with the origin of the rows anywhere else float32 would keep nothing from 1e-4 on."""
    check(function, make(33, 6, scale=scale), (1e5, 2, "mean", 0.0), device)


def test_another_origin_loses_the_digits(device):
    """The least probable column, a padded one that holds 0: the same mathematics, as the formula is usually written."""
    wrong = planted(kernel, "best = tl.max(p, 1)", "best = tl.min(p, 1)")
    check(wrong.large_margin_triton, make(33, 6, scale=0.2), (1e5, 2, "mean", 0.0), device)
    with pytest.raises(AssertionError):
        check(wrong.large_margin_triton, make(33, 6, scale=4.0), (1e5, 2, "mean", 0.0), device)


@FUNCTIONS
@pytest.mark.parametrize("scale", [1e4, 1e-40])
def test_extreme_logits(scale, function, device):
    """All rivals are chosen: probabilities that differ in float64 are equal in float32."""
    check(function, make(17, 6, scale=scale), (10.0, 5, "mean", 1e-3), device)


@FUNCTIONS
def test_logits_that_are_not_contiguous(function, device):
    logits, *others = make(17, 6)
    check(function, (logits.T.contiguous().T, *others), (10.0, 2, "mean", 0.0), device)


@FUNCTIONS
def test_a_class_that_no_window_has(function, device):
    logits, gram, labels, upstream = make(17, 6)
    check(function, (logits, gram, labels.clamp(max=4), upstream), (10.0, 5, "mean", 0.0), device)


def test_the_definition_is_differentiable_where_its_norm_is_constant():
    """A floor above every norm: only then is the gradient, which takes norms as constants, that of the value."""
    generator = torch.Generator().manual_seed(0)
    z, w, c = (
        torch.randn(*shape, generator=generator).double().requires_grad_() for shape in ((5, 3), (4, 3), (4,))
    )
    labels = torch.randint(0, 4, (5, 2), generator=generator)
    for aggregation in AGGREGATIONS:
        assert torch.autograd.gradcheck(
            lambda *v, kind=aggregation: large_margin_reference(*v, labels, 1.0, 2, kind, 1e3), (z, w, c)
        )


def test_the_replaced_cross_entropy_is_differentiable():
    logits, _, labels, _ = make(5, 4, 1)
    values = logits.double().requires_grad_(), logits[:, 1].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: replaced_cross_entropy_reference(*v, labels[:, 0]), values)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_the_closed_form_is_the_norm_by_autograd(aggregation, floor):
    generator = torch.Generator().manual_seed(0)
    z, w, c = (
        torch.randn(*shape, generator=generator).double().requires_grad_() for shape in ((9, 4), (6, 4), (6,))
    )
    labels, upstream = (
        torch.randint(0, 6, (9, 2), generator=generator),
        torch.randn(9, 2, generator=generator),
    )
    expected = large_margin_reference(z, w, c, labels, 1.0, 3, aggregation, floor)
    found = large_margin(z @ w.T + c, w, labels, gamma=1.0, top_k=3, aggregation=aggregation, floor=floor)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    wanted = torch.autograd.grad((expected * upstream).sum(), (z, w, c))
    for ours, theirs in zip(torch.autograd.grad((found * upstream).sum(), (z, w, c)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_distance_grows_with_the_features_and_not_with_the_classifier():
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(9, 4, generator=generator).double(), torch.randn(6, 4, generator=generator).double()
    labels = torch.randint(0, 6, (9, 1), generator=generator)
    one = large_margin(z @ w.T, w, labels, gamma=1e9)
    scaled = large_margin((7.0 * z) @ (w / 7.0).T, w / 7.0, labels, gamma=1e9)
    torch.testing.assert_close(
        scaled, 7.0 * one, rtol=1e-4, atol=1e-9
    )  # 1e-8 is added to norms of 1e-3 and more


@pytest.mark.parametrize(
    ("function", "dtype"), [(kernel.large_margin_triton, torch.float32), (large_margin_closed, torch.float64)]
)
def test_stacked_runs_are_single_runs(function, dtype, device):
    """The kernel does the same arithmetic; the library's stacked products may add in another order, hence float64."""
    runs = [make(9, 5, seed=seed)[:3] for seed in range(3)]
    runs = [(logits.to(dtype), gram.to(dtype), labels) for logits, gram, labels in runs]

    def slope(logits, gram, labels):
        return grad(lambda x: function(x, gram, labels, 10.0, 2, "mean", 0.0).sum())(logits)

    stacked = [torch.stack(parts).to(device) for parts in zip(*runs, strict=True)]
    found = vmap(slope)(*stacked)
    for number in range(3):
        torch.testing.assert_close(
            found[number], slope(*(part[number] for part in stacked)), rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize(
    ("old", "new", "aggregation"),
    [
        ("p = tl.exp(values - tl.max(values, 1)[:, None])", "p = tl.exp(0.999 * values)", "mean"),
        ("q -= tl.sum(tl.where(top, q, 0.0), 1)[:, None]", "q -= 0.99 * tl.max(q, 1)[:, None]", "mean"),
        ("- 2.0 * to_top + length", "- 2.0 * to_top + 1.01 * length", "mean"),
        ("- 2.0 * q + s", "- 2.0 * q + 0.9 * s", "mean"),
        ("- 2.0 * own * p * mixed", "- 1.98 * own * p * mixed", "mean"),
        ("smaller = here < total", "smaller = here > total", "smallest"),
        ("pull - hot * tl.sum(pull, 1)[:, None]", "pull", "mean"),
        ("pull += tl.where(chosen & free[:, None]", "pull += tl.where(chosen", "each"),
        ("by_l = p * (slope - tl.sum(p * slope, 1)[:, None])", "by_l = p * slope", "each"),
    ],
)
def test_a_planted_error_is_found(old, new, aggregation, device):
    wrong = planted(kernel, old, new)
    with pytest.raises(AssertionError):
        check(wrong.large_margin_triton, make(33, 6), (0.5, 3, aggregation, 0.0), device)


def check_replaced(function, windows, classes, device, *, dtype=torch.float32, scale=3.0):
    """A logarithm of a sum of K exponentials: K + 8 roundings and those of the exponents, 4 max|l|; see README.md."""
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(windows, classes, generator=generator)).to(dtype)
    target = (scale * torch.randn(windows, generator=generator)).to(dtype)
    labels, upstream = (
        torch.randint(0, classes, (windows,), generator=generator),
        torch.randn(windows, generator=generator),
    )
    value, slopes = truth(
        lambda *v: (replaced_cross_entropy_reference(*v, labels) * upstream).sum(), [logits, target]
    )
    placed = [logits.to(device), target.to(device)]
    found, found_slopes = value_and_gradients(
        lambda *v: (function(*v, labels.to(device)) * upstream.to(device)).sum(), placed
    )
    largest = max(logits.double().abs().max().item(), target.double().abs().max().item())
    step = EPS32 * (classes + 8 + 4 * largest)
    size = upstream.abs().sum().item()
    assert_within(found.float(), value, size * step + windows * EPS32 * size * 4 * largest, "loss")
    for ours, exact in zip(found_slopes, slopes, strict=True):
        assert_within(ours, exact, upstream.abs().max().item() * step, "gradient")


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (63, 6), (129, 20), (5, 1023)])
def test_the_replaced_cross_entropy_is_its_reference(shape, device):
    check_replaced(kernel.replaced_cross_entropy_triton, *shape, device)


@pytest.mark.parametrize("scale", [1e4, 1e-40])
def test_the_replaced_cross_entropy_of_extreme_logits(scale, device):
    check_replaced(kernel.replaced_cross_entropy_triton, 17, 6, device, scale=scale)


def test_the_replaced_cross_entropy_of_logits_that_are_not_contiguous(device):
    def turned(logits, target, labels):
        return kernel.replaced_cross_entropy_triton(
            logits.T.contiguous().T, torch.stack([target] * 2, 1)[:, 0], labels
        )

    check_replaced(turned, 17, 6, device)


def test_the_replaced_cross_entropy_in_bfloat16(device):
    check_replaced(kernel.replaced_cross_entropy_triton, 17, 6, device, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "values = tl.where(hot, own[:, None], values)",
            "values = tl.where(hot, 0.99 * own[:, None], values)",
        ),
        ("g * (mine - 1.0)", "g * (mine - 0.999)"),
        ("tl.where(hot, 0.0, p)", "p"),
    ],
)
def test_a_planted_error_in_the_replaced_cross_entropy_is_found(old, new, device):
    wrong = planted(kernel, old, new)
    with pytest.raises(AssertionError):
        check_replaced(wrong.replaced_cross_entropy_triton, 33, 6, device)


def angles(windows=7, width=4, classes=5):
    generator = torch.Generator().manual_seed(0)
    features, weight = (
        torch.randn(windows, width, generator=generator),
        torch.randn(classes, width, generator=generator),
    )
    return features.double(), weight.double(), torch.randint(0, classes, (windows,), generator=generator)


def test_no_angular_margin_is_the_cross_entropy_of_scaled_cosines():
    z, w, y = angles()
    cosines = torch.nn.functional.normalize(z) @ torch.nn.functional.normalize(w).T
    expected = torch.nn.functional.cross_entropy(7.0 * cosines, y, reduction="none")
    torch.testing.assert_close(additive_angular(z, w, y, scale=7.0, margin=0.0), expected)


def test_the_additive_margin_turns_the_angle():
    z, w, y = (
        torch.tensor([[1.0, 0.0]]).double(),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(),
        torch.tensor([0]),
    )
    found = additive_angular(z, w, y, scale=1.0, margin=0.5)
    assert found.item() == pytest.approx(math.log(math.exp(math.cos(0.5)) + 1.0) - math.cos(0.5), abs=1e-6)


def test_a_larger_margin_never_costs_less():
    z, w, y = angles(windows=64)
    losses = [additive_angular(z, w, y, margin=m) for m in (0.0, 0.2, 0.5, 1.0)]
    assert all((more >= less - 1e-12).all() for less, more in pairwise(losses))
    losses = [large_margin_softmax(z, w, y, margin=m) for m in (1, 2, 3, 4)]
    assert all((more >= less - 1e-5).all() for less, more in pairwise(losses))


def test_a_margin_of_one_is_the_softmax():
    z, w, y = angles()
    expected = torch.nn.functional.cross_entropy(z @ w.T, y, reduction="none")
    torch.testing.assert_close(large_margin_softmax(z, w, y, margin=1), expected, rtol=1e-6, atol=1e-6)


def test_the_multiplied_angle_by_the_formula_of_cosines():
    z, w, y = (
        torch.tensor([[2.0, 0.0]]).double(),
        torch.tensor([[1.0, 1.0], [0.0, 1.0]]).double(),
        torch.tensor([0]),
    )
    target = math.sqrt(8.0) * math.cos(2 * math.pi / 4)  # angle of 45 degrees, doubled; |z| |w| = 2 sqrt 2
    found = large_margin_softmax(z, w, y, margin=2)
    assert found.item() == pytest.approx(math.log(math.exp(target) + 1.0) - target, abs=1e-6)


@pytest.mark.parametrize("function", [additive_angular, large_margin_softmax])
def test_the_angular_losses_are_differentiable(function):
    z, w, y = angles(windows=4)
    assert torch.autograd.gradcheck(lambda a, b: function(a, b, y), (z.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("loss", [additive_angular, large_margin_softmax])
def test_stacked_angular_runs_are_single_runs(loss, device):
    generator = torch.Generator().manual_seed(0)
    z, w = (torch.randn(3, n, 4, generator=generator).to(device) for n in (7, 5))
    y = torch.randint(0, 5, (3, 7), generator=generator).to(device)

    def slopes(features, weight, labels):
        return grad(lambda a, b: loss(a, b, labels).sum(), (0, 1))(features, weight)

    for found, expected in zip(vmap(slopes)(z, w, y), zip(*map(slopes, z, w, y), strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_bfloat16_features_meet_trigonometry_in_float32(device):
    """Two unit vectors of three roundings each, a product of one and a logit of one: 8 x 2^-9 x scale a logit.

    The label's angle multiplies its cosine's error by at most 1 + |cot theta|; a cross-entropy errs by at most twice
    the largest error of a logit.
    """
    z, w, y = (t.to(device) for t in angles(windows=16, width=8))
    z, w = z.bfloat16(), w.bfloat16()
    exact = additive_angular(z.double(), w.double(), y, scale=4.0)
    cosine = torch.nn.functional.cosine_similarity(z.double(), w.double()[y])
    growth = 1 + (cosine / (1 - cosine**2).sqrt()).abs()
    assert_within(additive_angular(z, w, y, scale=4.0), exact.cpu(), (2 * 4.0 * 2**-6 * growth).cpu(), "loss")
    straight = large_margin_softmax(
        w, w, torch.arange(len(w), device=device)
    )  # angle 0, where arccos has no slope
    assert straight.dtype == torch.float32
    _, slopes = value_and_gradients(
        lambda a: large_margin_softmax(a, w, torch.arange(len(w), device=device)), [w]
    )
    assert slopes[0].isfinite().all()


ZEROS = torch.zeros


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: large_margin(ZEROS(3, 1), ZEROS(1, 2), ZEROS(3, 1), gamma=1.0),
            ShapeError,
            "at least 2 classes",
        ),
        (
            lambda: large_margin(ZEROS(3, 4), ZEROS(4, 2), ZEROS(3), gamma=1.0),
            ShapeError,
            "labels of a window",
        ),
        (lambda: large_margin(ZEROS(3, 4), ZEROS(4, 2), ZEROS(3, 1), gamma=0.0), ConfigError, "gamma > 0"),
        (lambda: additive_angular(ZEROS(3, 4), ZEROS(5, 2), ZEROS(3)), ShapeError, r"\(classes, F\)"),
        (lambda: additive_angular(ZEROS(3, 4), ZEROS(5, 4), ZEROS(3), margin=4.0), ConfigError, "0 to pi"),
        (lambda: large_margin_softmax(ZEROS(3, 4), ZEROS(5, 4), ZEROS(2)), ShapeError, "labels must be"),
        (
            lambda: large_margin_softmax(ZEROS(3, 4), ZEROS(5, 4), ZEROS(3), margin=0),
            ConfigError,
            "at least 1",
        ),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_the_processor_path_of_the_public_function():
    logits, _, labels, _ = make(9, 5)
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    found = large_margin(logits, weight, labels, gamma=2.0, top_k=9)
    torch.testing.assert_close(
        found,
        large_margin_closed(logits, weight @ weight.T, labels, 2.0, 4, "mean", 0.0),
        rtol=1e-4,
        atol=1e-5,
    )


def test_what_all_rows_of_the_classifier_share_does_not_matter():
    """The norms see differences of rows alone, and so does the arithmetic: 1e3 added to each costs no digits."""
    logits, _, labels, _ = make(9, 5)
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    shifted = weight + 1e3
    exact = large_margin(logits.double(), shifted.double(), labels, gamma=1e9)
    torch.testing.assert_close(
        large_margin(logits, shifted, labels, gamma=1e9).double(), exact, rtol=1e-4, atol=1e-5
    )
