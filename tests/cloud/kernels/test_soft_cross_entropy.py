"""Soft cross-entropy: kernel and processor path against float64, and what they must do at the edges."""

import pytest
import torch
from kernel_checks import EPS32, assert_within, planted, truth, value_and_gradients
from torch.func import grad, vmap
from wearfleet_cloud.kernels.soft_cross_entropy import (
    kernel,  # the Triton kernels, called directly: on a CPU they run in Triton's interpreter
    soft_cross_entropy,
    soft_cross_entropy_direct,
    soft_cross_entropy_reference,
)
from wearfleet_protos.errors import ConfigError, ShapeError

FORMS = ["hard", "pairs", "dense"]


def make(domains, windows, classes, form="hard", *, dtype=torch.float32, weighted=True, scale=3.0, seed=0):
    """Differentiable tensors and the other arguments, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(domains, windows, classes, generator=generator)).to(dtype)
    weight = (torch.rand(domains, windows, generator=generator) > 0.3).float() if weighted else None
    labels, other = torch.randint(0, classes, (2, domains, windows), generator=generator)
    if form == "hard":
        return (logits,), (labels, None, None, weight, 0.1)
    if form == "pairs":
        return (logits,), (labels, other, torch.rand(domains, generator=generator), weight, 0.0)
    dense = torch.softmax(torch.randn(domains, windows, classes, generator=generator), -1).to(dtype)
    return (logits, dense), (None, None, weight, 0.1)


def check(function, leaves, others, device):
    """Value and gradients within what float32 arithmetic allows.

    A loss is a sum of K products t (lse - l): each carries the rounding of lse (a sum of K exponentials: K + 4
    roundings, taken absolutely because lse is a logarithm) and of the gap itself, relative to max|l|. A domain's
    mean adds B roundings relative to its value. The gradient w/W (p sum(t) - t) has error |w/W| (K + 8 + max|l|) eps,
    since an error e of the exponent changes p by the factor 1 + e.
    """
    value, gradients = truth(soft_cross_entropy_reference, leaves, *others)
    moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in others]
    found, found_gradients = value_and_gradients(function, [t.to(device) for t in leaves], *moved)
    _, windows, classes = leaves[0].shape
    largest = leaves[0].double().abs().max().item()
    each = EPS32 * (classes + 8 + 4 * largest)
    assert_within(found.to(torch.float32), value, each + windows * EPS32 * value.abs(), "risk")
    weight = others[-2]
    total = torch.full((leaves[0].shape[0],), float(windows)) if weight is None else weight.double().sum(1)
    share = 1.0 / total.clamp(min=1e-12)[:, None, None]
    slopes = [share * each, share * (each + 2 * EPS32 * 2 * largest)]
    for gradient, expected, bound in zip(found_gradients, gradients, slopes, strict=False):
        assert_within(gradient, expected, bound, "gradient")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 2, 1), (2, 63, 6), (4, 129, 20), (1, 1023, 3)])
def test_the_kernel_is_the_reference(form, shape, device):
    check(kernel.soft_cross_entropy_triton, *make(*shape, form), device)


@pytest.mark.parametrize("form", FORMS)
def test_the_processor_path_is_the_reference(form):
    check(soft_cross_entropy_direct, *make(3, 63, 7, form), torch.device("cpu"))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_rounded_only_on_the_way_in_and_out(form, device):
    check(kernel.soft_cross_entropy_triton, *make(2, 65, 6, form, dtype=torch.bfloat16), device)


def test_many_classes(device):
    check(kernel.soft_cross_entropy_triton, *make(1, 3, 5000, "pairs"), device)


@pytest.mark.parametrize("scale", [1e4, 1e-40])
def test_extreme_logits(scale, device):
    check(kernel.soft_cross_entropy_triton, *make(2, 33, 6, "pairs", scale=scale), device)


def test_logits_that_are_not_contiguous_and_a_class_that_no_window_has(device):
    (logits,), (labels, *others) = make(2, 33, 6)
    others = (labels.clamp(max=4), *others)
    check(
        kernel.soft_cross_entropy_triton,
        (logits.transpose(1, 2).contiguous().transpose(1, 2),),
        others,
        device,
    )


def test_padding_may_hold_anything(device):
    (logits,), (labels, *_) = make(2, 5, 4, weighted=False)
    weight = torch.ones(2, 5)
    weight[:, 3:] = 0.0
    poisoned = logits.clone()
    poisoned[:, 3:] = float("nan")
    found, (gradient,) = value_and_gradients(
        kernel.soft_cross_entropy_triton,
        [poisoned.to(device)],
        labels.to(device),
        None,
        None,
        weight.to(device),
    )
    expected, (exact,) = truth(soft_cross_entropy_reference, [logits[:, :3]], labels[:, :3])
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:, :3].cpu().double(), exact, rtol=1e-5, atol=1e-7)
    assert (gradient[:, 3:] == 0).all()


@pytest.mark.parametrize("function", [kernel.soft_cross_entropy_triton, soft_cross_entropy_direct])
def test_a_domain_without_weight_has_no_risk_and_no_gradient(function, device):
    (logits,), (labels, *_) = make(2, 5, 4)
    weight = torch.tensor([[0.0] * 5, [1.0] * 5])
    value, (gradient,) = value_and_gradients(
        function, [logits.to(device)], labels.to(device), None, None, weight.to(device)
    )
    assert value[0] == 0.0
    assert (gradient[0] == 0.0).all()


def test_equal_logits_cost_the_logarithm_of_the_classes(device):
    risks = kernel.soft_cross_entropy_triton(
        torch.zeros(1, 7, 5, device=device), torch.zeros(1, 7, dtype=torch.int64, device=device)
    )
    assert risks.item() == pytest.approx(torch.tensor(5.0).log().item(), abs=4 * EPS32)


def test_the_reference_is_differentiable():
    (logits, dense), (_, _, weight, smoothing) = make(2, 5, 3, "dense")
    arguments = (logits.double().requires_grad_(), dense.double().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda a, b: soft_cross_entropy_reference(a, b, None, None, weight.double(), smoothing), arguments
    )


@pytest.mark.parametrize("form", FORMS)
def test_stacked_runs_are_single_runs(form, device):
    runs = [make(2, 17, 5, form, seed=seed) for seed in range(3)]

    def gradient_of(leaves, others):
        return grad(
            lambda *values: kernel.soft_cross_entropy_triton(*values, *others).sum(),
            tuple(range(len(leaves))),
        )(*leaves)

    def place(values):
        return tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in values)

    count = len(runs[0][0])
    tensors = [place(leaves + others[:-1]) for leaves, others in runs]
    stacked = [None if parts[0] is None else torch.stack(parts) for parts in zip(*tensors, strict=True)]
    smoothing = runs[0][1][-1]
    found = vmap(
        lambda *values: gradient_of(values[:count], (*values[count:], smoothing)),
        in_dims=tuple(None if part is None else 0 for part in stacked),
    )(*stacked)
    for number, values in enumerate(tensors):
        expected = gradient_of(values[:count], (*values[count:], smoothing))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[number], theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("old", "new", "form"),
    [
        ("tl.sum(targets * gap, 1)", "tl.sum(targets * gap, 1) * 1.001", "hard"),
        ("tl.exp(gap) * tl.sum(targets, 1)[:, None] - targets", "tl.exp(gap) - 1.001 * targets", "pairs"),
        ("-factor[:, None] * (1.0 - smoothing) * gap", "-factor[:, None] * gap", "dense"),
        ("part * hard + (1.0 - part) * second", "part * hard + part * second", "pairs"),
        ("window < B", "window < B - 1", "hard"),
    ],
)
def test_a_planted_error_is_found(old, new, form, device):
    wrong = planted(kernel, old, new)
    with pytest.raises(AssertionError):
        check(wrong.soft_cross_entropy_triton, *make(2, 33, 6, form), device)


def test_the_public_function_takes_float64_to_the_processor_path():
    leaves, (labels, other, share, weight, _) = make(2, 9, 4, "pairs")
    logits = leaves[0].double()
    found = soft_cross_entropy(logits, labels, other=other, share=share.double(), weight=weight.double())
    expected = soft_cross_entropy_reference(logits, labels, other, share.double(), weight.double())
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"labels": torch.zeros(2, 8, dtype=torch.int64)}, ShapeError, r"labels must be \(2, 9\)"),
        ({"weight": torch.ones(2)}, ShapeError, r"weight must be \(2, 9\)"),
        ({"share": torch.ones(2)}, ConfigError, "give both"),
        ({"smoothing": 1.0}, ConfigError, "below 1"),
        ({"logits": torch.zeros(9, 4)}, ShapeError, "domains, windows, classes"),
    ],
)
def test_bad_input_is_named(change, error, says):
    arguments = {"logits": torch.zeros(2, 9, 4), "labels": torch.zeros(2, 9, dtype=torch.int64)} | change
    with pytest.raises(error, match=says):
        soft_cross_entropy(arguments.pop("logits"), arguments.pop("labels"), **arguments)
