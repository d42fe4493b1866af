"""Contrastive losses: kernels against the whole matrix of similarities in float64, and the laws of each loss."""

import math

import pytest
import torch
from kernel_checks import EPS32, ROUNDOFF, assert_within, planted, truth, value_and_gradients
from torch.func import grad, vmap
from wearfleet_cloud.kernels import contrastive
from wearfleet_cloud.kernels.contrastive import (
    kernel,  # the Triton kernels, called directly: on a CPU they run in Triton's interpreter
    multi_positive,
    pairwise_sigmoid,
    sigmoid_losses_reference,
    softmax_statistics_reference,
    supervised_contrastive,
)
from wearfleet_protos.errors import ConfigError, ShapeError


def make(rows, columns, width, *, dtype=torch.float32, scale=1.0, classes=3, seed=0):
    """Features of unit length with their scales, as the losses make them; some labels are absent."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    y = torch.randn(columns, width, generator=generator).to(dtype)
    scale_x = scale * 5.0 / x.float().norm(dim=1)
    scale_y = 1.0 / y.float().norm(dim=1)
    labels = [torch.randint(-1, classes, (count,), generator=generator) for count in (rows, columns)]
    labels[1][0] = 0
    upstream = torch.randn(2, rows, generator=generator)
    return (x, y, scale_x, scale_y), labels, upstream


def check(function, reference, leaves, others, upstream, device):
    """Values and gradients within what float32 arithmetic allows.

    A similarity, at most S, errs by d = (F + 6) eps S. A logarithm of a sum of N exponentials errs by d + (N + 6) eps,
    a sum over positives by N (d + eps S), and so does a sum of softplus. The slope by a similarity errs relatively by
    2 d + (N + 6) eps plus, in bfloat16, the rounding of the slab; a gradient is a sum over N (or M) of slopes times
    features times scales.
    """
    x, y, scale_x, scale_y = leaves[:4]

    def combined(call, weights):
        def total(*values):
            found = call(*values)
            parts = found[:2] if isinstance(found, tuple) else (found,)
            finite = [torch.where(part.isfinite(), part, torch.zeros_like(part)) for part in parts]
            return sum((part * w.to(part)).sum() for part, w in zip(finite, weights, strict=False))

        return total

    exact = [leaf.double() for leaf in leaves]
    values = reference(*exact, *others)
    _, slopes = truth(combined(reference, upstream), leaves, *others)
    placed = [leaf.to(device) for leaf in leaves]
    moved = [other.to(device) if isinstance(other, torch.Tensor) else other for other in others]
    runs = []
    kept = combined(lambda *given: runs.append(function(*given)) or runs[0], upstream.to(device))
    _, found_slopes = value_and_gradients(kept, placed, *moved)
    found = runs[0]
    n = max(len(x), len(y))
    s = (
        (x.double() @ y.double().T).abs() * scale_x.double()[:, None] * scale_y.double()[None]
    ).max().item() + 1e-300
    sizes = (
        x.double().norm(dim=1).max()
        * y.double().norm(dim=1).max()
        * scale_x.double().max()
        * scale_y.double().max()
    )
    d = (x.shape[1] + 6) * EPS32 * max(s, sizes.item())
    if isinstance(values, tuple):
        for number, bound in enumerate((d + (n + 6) * EPS32, n * (d + EPS32 * s), 0.0, d)):
            whole = values[number].isfinite()
            assert (found[number].cpu().isfinite() == whole).all()
            assert_within(
                found[number].cpu()[whole].float(), values[number][whole], bound + n * EPS32 * s, str(number)
            )
    else:
        assert_within(found, values, n * (d + (n + 6) * EPS32 * (1 + s + 10)), "losses")
    relative = 2 * d + (n + 6) * EPS32 + (3 * ROUNDOFF[x.dtype] if x.dtype == torch.bfloat16 else 0.0)
    u = upstream.abs().max().item() * 2
    reach = n * u * relative * scale_x.abs().max().item() * scale_y.abs().max().item()
    big = max(x.double().abs().max().item(), y.double().abs().max().item())
    bounds = [reach * big, reach * big]
    bounds += [
        n * u * relative * x.shape[1] * big**2 * scale.abs().max().item() for scale in (scale_y, scale_x)
    ]
    bounds += [n * n * u * relative]  # of a bias
    for number, (ours, theirs) in enumerate(zip(found_slopes, slopes, strict=True)):
        assert_within(ours, theirs, bounds[number], f"gradient {number}")


def check_softmax(function, problem, without_self, device):
    leaves, labels, upstream = problem
    check(function, softmax_statistics_reference, leaves, (*labels, without_self), upstream, device)


def check_sigmoid(function, problem, device):
    leaves, labels, upstream = problem
    check(function, sigmoid_losses_reference, (*leaves, torch.tensor(-2.0)), labels, upstream, device)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 63), (17, 33, 5), (63, 20, 70), (129, 40, 3)])
def test_the_softmax_kernel_is_the_reference(shape, device):
    check_softmax(kernel.softmax_statistics_triton, make(*shape), False, device)


def test_columns_that_are_not_shared_out(device, monkeypatch):
    monkeypatch.setattr(kernel, "_PROGRAMS", 1)
    check_softmax(kernel.softmax_statistics_triton, make(17, 70, 5), False, device)


def test_slabs_of_rows_make_the_whole_gradient(device, monkeypatch):
    monkeypatch.setattr(kernel, "_SLAB", 16)
    check_softmax(kernel.softmax_statistics_triton, make(40, 33, 5), False, device)  # slabs of 16, 16 and 8
    check_sigmoid(kernel.sigmoid_losses_triton, make(40, 33, 5), device)


def test_pairs_of_which_the_sigmoid_is_sure_keep_their_digits(device):
    """Cosine 0, bias -10, all labels different: a pair costs log(1 + e^-10), and 1 + e^-10 has lost its digits.

    An exponential, a quotient and two products of one rounding each, a logarithm of two, and 70 additions.
    """
    x, y = torch.eye(2)[:1].repeat(9, 1), torch.eye(2)[1:].repeat(70, 1)
    ones = torch.ones(9), torch.ones(70)
    labels = torch.arange(9), 100 + torch.arange(70)
    given = [t.to(device) for t in (x, y, *ones, torch.tensor(-10.0), *labels)]
    found = kernel.sigmoid_losses_triton(*given)
    exact = torch.full((9,), 70 * math.log1p(math.exp(-10.0)), dtype=torch.float64)
    assert_within(found, exact, (6 + 70 + 10) * EPS32 * exact, "losses")


def test_without_the_row_itself(device):
    (x, _, scale, other), (labels, _), upstream = make(33, 33, 6)
    problem = (x, x, scale, other), (labels, labels), upstream
    check_softmax(kernel.softmax_statistics_triton, problem, True, device)


@pytest.mark.slow
def test_many_rows_in_several_slabs_and_without_splits(device):
    check_softmax(kernel.softmax_statistics_triton, make(513, 65, 4), False, device)
    check_sigmoid(kernel.sigmoid_losses_triton, make(513, 2, 4), device)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 63), (17, 33, 5), (63, 20, 70), (129, 2, 3)])
def test_the_sigmoid_kernel_is_the_reference(shape, device):
    check_sigmoid(kernel.sigmoid_losses_triton, make(*shape), device)


def test_bfloat16_is_rounded_only_on_the_way_in_and_out(device):
    check_softmax(kernel.softmax_statistics_triton, make(17, 33, 20, dtype=torch.bfloat16), False, device)
    check_sigmoid(kernel.sigmoid_losses_triton, make(17, 33, 20, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("scale", [200.0, 1e-40])
def test_extreme_similarities(scale, device):
    check_softmax(kernel.softmax_statistics_triton, make(17, 33, 5, scale=scale), False, device)


def test_similarities_of_ten_thousand(device):
    check_softmax(kernel.softmax_statistics_triton, make(17, 33, 5, scale=1e4), False, device)
    check_sigmoid(kernel.sigmoid_losses_triton, make(17, 33, 5, scale=1e4), device)


@pytest.mark.parametrize("scale", [1e4, 1e-40])
def test_features_of_extreme_length(scale, device, monkeypatch):
    """Unit vectors do not see the length; what is shorter than 1e-12 counts as no direction at all."""
    z, labels = features(rows=17)
    z = (scale * z).float()
    exact, (slope,) = value_and_gradients(lambda x: supervised_contrastive(x, labels), [z.double()])
    monkeypatch.setattr(contrastive, "takes_triton", lambda *_: True)
    found, (found_slope,) = value_and_gradients(
        lambda x: supervised_contrastive(x, labels.to(device)), [z.to(device)]
    )
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)  # similarities up to 14 of 11 roundings
    allowed = 1e-4 * slope.abs().max().item()
    torch.testing.assert_close(found_slope.double().cpu(), slope, rtol=0, atol=allowed)


def test_a_class_without_columns_has_no_positives(device):
    leaves, (labels, others), upstream = make(17, 33, 5)
    problem = leaves, (labels.clamp(min=0), torch.where(others == 1, 2, others)), upstream
    check_softmax(kernel.softmax_statistics_triton, problem, False, device)
    check_sigmoid(kernel.sigmoid_losses_triton, problem, device)


def test_features_that_are_not_contiguous(device):
    (x, y, *scales), labels, upstream = make(17, 33, 5)
    problem = (x.T.contiguous().T, y.T.contiguous().T, *scales), labels, upstream
    check_softmax(kernel.softmax_statistics_triton, problem, False, device)


def test_stacked_runs_are_single_runs(device):
    runs = [make(9, 12, 5, seed=seed) for seed in range(3)]

    def slopes(x, y, scale_x, scale_y, labels_x, labels_y):
        def total(a, b):
            lse, positives, _, _ = kernel.softmax_statistics_triton(
                a, b, scale_x, scale_y, labels_x, labels_y, False
            )
            return (lse - 0.3 * positives).sum()

        return grad(total, (0, 1))(x, y)

    tensors = [tuple(t.to(device) for t in (*leaves, *labels)) for leaves, labels, _ in runs]
    found = vmap(slopes)(*(torch.stack(parts) for parts in zip(*tensors, strict=True)))
    for number, values in enumerate(tensors):
        for ours, theirs in zip(found, slopes(*values), strict=True):
            torch.testing.assert_close(ours[number], theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total = total * tl.exp(tl.where(top ==", "total = total + 0.0 * tl.exp(tl.where(top =="),
        ("tl.where(same, s, 0.0)", "tl.where(compared, s, 0.0)"),
        ("by_lse + problem * M + i, mask=i < M, other=0.0)[:, None] * share", "by_lse + problem * M + i, mask=i < M, other=0.0)[:, None] * share * 0.9"),  # noqa: E501
        ("tl.where(compared & (mine[:, None] == theirs[None, :]), extra, 0.0)", "tl.where(compared, extra, 0.0)"),
        ("by_y += part.transpose(1, 2)", "by_y = part.transpose(1, 2) * 0.9"),
    ],
)  # fmt: skip
def test_a_planted_error_is_found(old, new, device):
    wrong = planted(kernel, old, new)
    wrong._PROGRAMS = 1  # so that a program sees more than one tile
    with pytest.raises(AssertionError):
        check_softmax(wrong.softmax_statistics_triton, make(17, 40, 5), False, device)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.where(present, _softplus(against), 0.0)", "_softplus(against)"),
        ("tl.maximum(values, 0.0) + small * ratio", "tl.maximum(values, 0.0) + small"),
        ("losses[0] if len(losses) == 1 else losses.sum(0)", "losses[0]"),
        ("tl.where(against > 0.0, 1.0, small)", "tl.where(against > 0.0, small, 1.0)"),
        ("tl.store(sums + place, tl.sum(slope))", "tl.store(sums + place, 0.5 * tl.sum(slope))"),
        ("by_bias.add_(sums.sum(dim=(1, 2)))", "by_bias.copy_(sums.sum(dim=(1, 2)))"),
    ],
)  # fmt: skip
def test_a_planted_error_in_the_sigmoid_is_found(old, new, device):
    wrong = planted(kernel, old, new)
    wrong._SLAB = 16
    with pytest.raises(AssertionError):
        check_sigmoid(wrong.sigmoid_losses_triton, make(17, 40, 5), device)


def features(rows=12, width=5, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, width, generator=generator).double(),
        torch.randint(0, classes, (rows,), generator=generator),
    )


def test_the_corrected_loss_row_by_row():
    z, labels = features()
    unit = torch.nn.functional.normalize(z)
    terms = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            s = {j: (unit[i] @ unit[j]).item() / 0.07 for j in others}
            lse = math.log(sum(math.exp(v) for v in s.values()))
            terms.append(-sum(s[j] - lse for j in positives) / len(positives))
    assert supervised_contrastive(z, labels).item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)


def test_the_strict_loss_row_by_row():
    z, labels = features(width=3)
    z = 0.1 * z
    total = 0.0
    for i in range(len(z)):
        s = (z @ z[i] / 0.07).tolist()
        top = max(s)
        normaliser = math.log(sum(math.exp(v - top) for j, v in enumerate(s) if j != i) + 1e-6)
        positives = [j for j in range(len(z)) if j != i and labels[j] == labels[i]]
        total -= sum(s[j] - top - normaliser for j in positives) / (len(positives) + 1e-6)
    assert supervised_contrastive(z, labels, mode="strict").item() == pytest.approx(total / len(z), rel=1e-6)


def test_length_does_not_matter_to_the_corrected_loss_and_does_to_the_strict():
    z, labels = features()
    assert supervised_contrastive(7.0 * z, labels).item() == pytest.approx(
        supervised_contrastive(z, labels).item()
    )
    strict = [supervised_contrastive(scale * z, labels, mode="strict").item() for scale in (0.1, 0.2)]
    assert strict[0] != pytest.approx(strict[1], rel=0.01)


@pytest.mark.parametrize("mode", ["corrected", "strict"])
def test_padding_takes_no_part(mode):
    z, labels = features()
    weight = torch.ones(12)
    weight[9:] = 0.0
    spoilt = z.clone()
    spoilt[9:] = torch.nan
    found = supervised_contrastive(spoilt, labels, weight=weight, mode=mode)
    assert found.item() == pytest.approx(
        supervised_contrastive(z[:9], labels[:9], mode=mode).item(), rel=1e-6
    )


def test_without_positives_there_is_no_loss():
    z, _ = features()
    assert supervised_contrastive(z, torch.arange(12)).item() == 0.0


def test_two_towers_that_agree_are_cheaper_than_two_that_do_not():
    z, labels = features(rows=6, classes=2)
    names = torch.tensor([0, 1])
    anchors = torch.stack([z[labels == k].mean(0) for k in (0, 1)])
    tau = torch.tensor(0.2).double()
    right = multi_positive(z, anchors, labels, names, temperature=tau)
    wrong = multi_positive(z, anchors.flip(0), labels, names, temperature=tau)
    assert right < wrong


def test_the_sigmoid_loss_pair_by_pair():
    (x, lx), (y, ly) = features(), features(rows=4, seed=1)
    scale, bias = torch.tensor(10.0).double(), torch.tensor(-3.0).double()
    total = 0.0
    for i in range(12):
        for j in range(4):
            cosine = torch.nn.functional.cosine_similarity(x[i], y[j], dim=0).item()
            total += math.log1p(math.exp(-(1 if lx[i] == ly[j] else -1) * (10.0 * cosine - 3.0)))
    found = pairwise_sigmoid(x, y, lx, ly, scale=scale, bias=bias)
    assert found.item() == pytest.approx(total / 12, rel=1e-9)


@pytest.mark.parametrize("mode", ["corrected", "strict"])
def test_the_supervised_loss_is_differentiable(mode):
    z, labels = features(rows=6)
    assert torch.autograd.gradcheck(
        lambda x: supervised_contrastive(0.2 * x, labels, mode=mode), z.requires_grad_()
    )


def test_the_losses_of_two_towers_are_differentiable_by_everything_learnt():
    (x, lx), (y, ly) = features(rows=5), features(rows=4, seed=1)
    leaves = [t.requires_grad_() for t in (x, y, torch.tensor(0.3).double(), torch.tensor(-1.0).double())]
    assert torch.autograd.gradcheck(lambda a, b, t, _: multi_positive(a, b, lx, ly, temperature=t), leaves)
    assert torch.autograd.gradcheck(
        lambda a, b, s, c: pairwise_sigmoid(a, b, lx, ly, scale=s, bias=c), leaves
    )


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda z: supervised_contrastive(z, torch.zeros(3)), ShapeError, r"labels must be \(4,\)"),
        (lambda z: supervised_contrastive(z, torch.zeros(4), temperature=0.0), ConfigError, "temperature > 0"),
        (lambda z: supervised_contrastive(z, torch.zeros(4), weight=torch.zeros(3)), ShapeError, "weight must be"),
        (lambda z: multi_positive(z, z[:, :1], torch.zeros(4), torch.zeros(4), temperature=z.sum()), ShapeError, "rows, F"),  # noqa: E501
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.zeros(4, 2))
