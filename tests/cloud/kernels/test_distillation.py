"""Distillation: kernel and reference against float64, and the laws of the divergences."""

import pytest
import torch
from kernel_checks import EPS32, assert_within, planted, truth, value_and_gradients
from torch.func import grad, vmap
from wearfleet_cloud.kernels.distillation import DIVERGENCES, distillation, distillation_reference, kernel
from wearfleet_protos.errors import ConfigError, ShapeError


def make(windows, classes, *, dtype=torch.float32, labelled=True, weighted=True, scale=3.0, seed=0):
    """Student and teacher, labels and weight, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, windows, classes, generator=generator)).to(dtype)
    labels = torch.randint(0, classes, (windows,), generator=generator) if labelled else None
    weight = (torch.rand(windows, generator=generator) > 0.2).float() if weighted else None
    if weight is not None:
        weight[0] = 1.0
    return (student, teacher), (labels, weight)


def check(function, leaves, others, settings, device):
    """Value and gradients within what float32 arithmetic allows.

    A logarithm of a probability has the absolute error d = (K + 8 + 4 max|l| / tau) eps: a sum of K exponentials of
    rounded differences. A divergence is a mean of such logarithms (tau^2 d), and errs also relative to its terms by
    K eps. Its gradient p (u - sum p u) / tau has the error tau (d (1 + |u|) p + K eps |u| p), |u| at most
    2 max|l| / tau + log K.
    """
    tau, alpha = settings[1], settings[2]
    value, gradients = truth(distillation_reference, leaves, *others, *settings)
    moved = [None if t is None else t.to(device) for t in others]
    found, found_gradients = value_and_gradients(function, [t.to(device) for t in leaves], *moved, *settings)
    windows, classes = leaves[0].shape
    largest = max(t.double().abs().max().item() for t in leaves)
    step = EPS32 * (classes + 8 + 4 * largest / min(tau, 1.0))
    size = 2 * largest / tau + torch.tensor(float(classes)).log().item()
    each = (1 - alpha) * step + alpha * tau**2 * (step + EPS32 * classes * size)
    assert_within(found.float(), value, 2 * each + windows * EPS32 * value.abs(), "loss")
    weight = torch.ones(windows) if others[1] is None else others[1]
    share = (weight.double() / weight.double().sum())[:, None]
    slope = share * ((1 - alpha) * step + alpha * tau * (step * (1 + size) + EPS32 * classes * size))
    for gradient, expected in zip(found_gradients, gradients, strict=True):
        assert_within(gradient, expected, 2 * slope, "gradient")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (63, 6), (129, 20), (5, 1023)])
def test_the_kernel_is_the_reference(divergence, shape, device):
    check(kernel.distillation_triton, *make(*shape), (divergence, 2.0, 0.7, 0.3), device)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_is_rounded_only_on_the_way_in_and_out(divergence, device):
    check(kernel.distillation_triton, *make(33, 7, dtype=torch.bfloat16), (divergence, 2.0, 0.7, 0.3), device)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("labelled", "weighted"), [(False, True), (True, False)])
def test_labels_and_weights_may_be_left_out(divergence, labelled, weighted, device):
    problem = make(9, 5, labelled=labelled, weighted=weighted)
    check(kernel.distillation_triton, *problem, (divergence, 1.0, 1.0 if not labelled else 0.5, 0.5), device)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale", [30.0, 1e4, 1e-40])
def test_extreme_logits(divergence, scale, device):
    check(kernel.distillation_triton, *make(9, 5, scale=scale), (divergence, 2.0, 0.7, 0.5), device)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_that_are_not_contiguous_and_a_class_that_no_window_has(divergence, device):
    (student, teacher), (labels, weight) = make(9, 5)
    turned = student.T.contiguous().T, teacher.T.contiguous().T
    check(
        kernel.distillation_triton, turned, (labels.clamp(max=3), weight), (divergence, 2.0, 0.7, 0.5), device
    )


def test_two_far_tails_leave_the_definition_finite():
    logits = torch.tensor([[0.0, -2000.0], [-2000.0, 0.0]])
    value, gradients = value_and_gradients(
        distillation_reference, [logits, logits.flip(0)], None, None, "jensen-shannon", 1.0, 1.0, 0.5
    )
    assert value.item() == pytest.approx(torch.tensor(2.0).log().item())
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_padding_may_hold_anything(device):
    (student, teacher), (labels, _) = make(6, 4)
    weight = torch.tensor([1.0, 1, 1, 1, 0, 0])
    arguments = ("jensen-shannon", 2.0, 0.5, 0.5)
    spoilt = [t.clone() for t in (student, teacher)]
    for tensor in spoilt:
        tensor[4:] = float("nan")
    found, gradients = value_and_gradients(
        kernel.distillation_triton,
        [t.to(device) for t in spoilt],
        labels.to(device),
        weight.to(device),
        *arguments,
    )
    expected, exact = truth(distillation_reference, [student[:4], teacher[:4]], labels[:4], None, *arguments)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, wanted in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient[:4].cpu().double(), wanted, rtol=1e-5, atol=1e-7)
        assert (gradient[4:] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_like_its_teacher_has_nothing_to_learn(divergence, device):
    logits = make(9, 5)[0][0].to(device)
    value, gradients = value_and_gradients(
        kernel.distillation_triton, [logits, logits], None, None, divergence, 2.0, 1.0, 0.5
    )
    assert abs(value.item()) < 9 * EPS32 * 20
    assert all(gradient.abs().max() < 9 * EPS32 * 20 for gradient in gradients)


def test_jensen_shannon_is_at_most_the_entropy_of_its_mixture_and_symmetric():
    (student, teacher), _ = make(9, 5, scale=30.0)
    tell = {"divergence": "jensen-shannon", "temperature": 1.0, "alpha": 1.0}
    one, two = distillation(student, teacher, **tell), distillation(teacher, student, **tell)
    assert 0.0 < one.item() <= torch.tensor(2.0).log().item()
    assert one.item() == pytest.approx(two.item(), rel=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_reference_is_differentiable(divergence):
    leaves, (labels, weight) = make(4, 3)
    leaves = tuple(leaf.double().requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(
        lambda s, t: distillation_reference(s, t, labels, weight.double(), divergence, 2.0, 0.6, 0.3), leaves
    )


def test_a_detached_teacher_costs_no_gradient(device):
    (student, teacher), (labels, _) = make(9, 5)
    student = student.to(device).requires_grad_()
    kernel.distillation_triton(
        student, teacher.to(device), labels.to(device), None, "forward", 2.0, 0.5, 0.5
    ).backward()
    (expected, _) = truth(
        distillation_reference, [student.detach().cpu(), teacher], labels, None, "forward", 2.0, 0.5, 0.5
    )[1]
    torch.testing.assert_close(student.grad.cpu().double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_stacked_runs_are_single_runs(divergence, device):
    runs = [make(7, 5, seed=seed) for seed in range(3)]

    def gradients(student, teacher, labels, weight):
        return grad(
            lambda s, t: kernel.distillation_triton(s, t, labels, weight, divergence, 2.0, 0.5, 0.5), (0, 1)
        )(student, teacher)

    tensors = [tuple(t.to(device) for t in (*leaves, *others)) for leaves, others in runs]
    found = vmap(gradients)(*(torch.stack(parts) for parts in zip(*tensors, strict=True)))
    for number, values in enumerate(tensors):
        for ours, theirs in zip(found, gradients(*values), strict=True):
            torch.testing.assert_close(ours[number], theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("old", "new", "divergence"),
    [
        ("losses = soft * tl.sum(p * (a - b), 1)", "losses = soft * tl.sum(p * (b - a), 1)", "forward"),
        ("by_s = q - p", "by_s = q - 1.001 * p", "forward"),
        ("by_t = p - q", "by_t = q - p", "reverse"),
        (
            "u, v = beta * (a - m), (1.0 - beta) * (b - m)",
            "u, v = beta * (a - m), beta * (b - m)",
            "jensen-shannon",
        ),
        ("losses -= hard *", "losses -= 1.001 * hard *", "reverse"),
        ("inside = window < N", "inside = window < N - 1", "forward"),
    ],
)
def test_a_planted_error_is_found(old, new, divergence, device):
    wrong = planted(kernel, old, new)
    with pytest.raises(AssertionError):
        check(wrong.distillation_triton, *make(33, 6, weighted=False), (divergence, 2.0, 0.5, 0.3), device)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"teacher": torch.zeros(4, 5)}, ShapeError, r"teacher must be \(4, 3\)"),
        ({"student": torch.zeros(4)}, ShapeError, "windows, classes"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ShapeError, r"labels must be \(4,\)"),
        ({"divergence": "sideways"}, ConfigError, "known: forward, reverse, jensen-shannon"),
        ({"temperature": 0.0}, ConfigError, "temperature > 0"),
        ({"alpha": 1.5}, ConfigError, "alpha in 0 to 1"),
        ({"beta": 1.0}, ConfigError, "beta between"),
    ],
)
def test_bad_input_is_named(change, error, says):
    arguments = {"student": torch.zeros(4, 3), "teacher": torch.zeros(4, 3)} | change
    with pytest.raises(error, match=says):
        distillation(
            arguments.pop("student"), arguments.pop("teacher"), arguments.pop("labels", None), **arguments
        )
