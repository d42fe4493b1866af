"""Optimal transport: kernels against whole matrices in float64, an exact solver, and published check figures."""

import pytest
import torch
from kernel_checks import EPS32, assert_within, planted, result_and_gradients, truth
from torch.func import grad, vmap
from wearfleet_cloud.kernels.sinkhorn import (
    group_lasso_plan,
    group_lasso_reference,
    kernel,  # the Triton kernels, called directly: on a CPU they run in Triton's interpreter
    kernel_group_lasso,
    transport_loss,
    transport_plan,
    transport_reference,
)
from wearfleet_cloud.kernels.sinkhorn.reference import costs, plan_of, potentials
from wearfleet_protos.errors import ConfigError, ShapeError

FULL, PARTIAL = (0.2, 1.0, 4, "squared"), (0.2, 0.6, 4, "euclidean")
FEW = [(0.2, 1.0, 2, "squared"), (0.2, 0.6, 2, "euclidean")]  # iterations: a streamed one is many launches


def make(problems, n, m, width, *, dtype=torch.float32, prior=False, scale=1.0, seed=0):
    """Points, masses (one of them 0 where there are enough), a prior, and a gradient for every problem."""
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(problems, n, width, generator=generator)).to(dtype)
    y = (scale * (torch.randn(problems, m, width, generator=generator) + 0.5)).to(dtype)
    a, b = (0.5 + torch.rand(problems, count, generator=generator) for count in (n, m))
    if n > 2:
        a[:, -1] = 0.0
    extra = scale**2 * torch.rand(problems, n, m, generator=generator) if prior else None
    upstream = torch.randn(problems, generator=generator)
    return (x, y), (a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True), extra), upstream


def first(function):
    """The loss alone: the kernel also returns its potentials."""

    def call(*arguments):
        found = function(*arguments)
        return found[0] if isinstance(found, tuple) else found

    return call


def check(function, problem, settings, device, offset=0.0):
    """Loss and gradients within what float32 arithmetic allows.

    A squared distance errs by d = (F + 6) eps 4 Z^2, Z the largest norm; over mean cost times epsilon that is e, and
    for plain distances d / (2 r) at the smallest distance r. An update's logarithm of a sum of n terms errs by e and
    (n + 8 + |u|) eps more, and an update is non-expansive, so after T of them the exponent of the plan is good to
    h = (2 T + 1) (e + (n + 8 + U) eps), U the largest potential. The loss, at most C = (largest cost / mean), errs by
    C (e^h - 1) and d; a gradient by its weights' h, over reach 2 Z. An ``offset`` of all points changes nothing.
    """
    (x, y), (a, b, prior), upstream = problem
    epsilon, mass, iterations, metric = settings
    others = (a, b, prior, *settings)
    value = transport_reference(
        x.double(), y.double(), *(None if t is None else t.double() for t in (a, b, prior)), *settings
    )
    _, slopes = truth(lambda *v: (transport_reference(*v) * upstream).sum(), [x, y], *others)
    moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in others]
    call = first(function)
    placed = [(points + offset).to(device) for points in (x, y)]
    found, found_slopes = result_and_gradients(call, upstream, placed, *moved)
    cost = costs(x.double(), y.double(), metric, None if prior is None else prior.double())
    mean = cost.mean((1, 2))
    z = max(x.double().norm(dim=2).max().item(), y.double().norm(dim=2).max().item())
    d = (x.shape[2] + 6) * EPS32 * 4 * z**2
    least = costs(x.double(), y.double(), "euclidean").amin().item()
    if metric == "euclidean":
        d = d / (2 * least)
    scaled = cost / (mean * epsilon)[:, None, None]
    u, v = potentials(scaled, a.double(), b.double(), mass, iterations)
    largest = max(u[a > 0].abs().max().item(), v.abs().max().item(), scaled.max().item())
    n = max(x.shape[1], y.shape[1])
    step = d / (mean * epsilon).min().item() + (n + 8 + 2 * largest) * EPS32
    h = torch.tensor((2 * iterations + 1) * step).expm1().item()
    reach = (cost.amax((1, 2)) / mean).max().item()
    assert_within(found, value, reach * h + d / mean.min().item(), "loss")
    plan = plan_of(scaled, u, v)
    weights = plan * 2 if metric == "squared" else plan / cost.clamp(min=1e-6)
    slope = (
        upstream.abs().max().item()
        / mean.min().item()
        * 2
        * z
        * (h + n * EPS32 + (2 * d / least if metric == "euclidean" else 0))
    )
    for ours, theirs, axis in zip(found_slopes, slopes, (2, 1), strict=True):
        assert_within(ours, theirs, 2 * slope * weights.sum(axis)[..., None] + 1e-30, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [FULL, PARTIAL])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 3, 63), (2, 17, 33, 5), (1, 63, 20, 33)])
def test_the_whole_kernel_is_the_reference(settings, prior, shape, device):
    check(kernel.transport_triton, make(*shape, prior=prior), settings, device)


@pytest.mark.slow
@pytest.mark.parametrize("settings", FEW)
@pytest.mark.parametrize("prior", [False, True])
def test_the_streamed_kernel_is_the_reference(settings, prior, device, monkeypatch):
    monkeypatch.setattr(kernel, "MOST_SMALL", 0)
    check(kernel.transport_triton, make(2, 17, 33, 5, prior=prior), settings, device)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 65, 1, 2), (1, 2, 513, 3), (1, 513, 2, 3)])
def test_points_beyond_one_program(shape, device):
    for settings in FEW:
        check(kernel.transport_triton, make(*shape), settings, device)


def test_slabs_of_rows_make_the_whole_gradient(device, monkeypatch):
    monkeypatch.setattr(kernel, "_SLAB", 16)
    check(kernel.transport_triton, make(1, 40, 33, 5), PARTIAL, device)  # slabs of 16, 16 and 8


def test_bfloat16_is_rounded_only_on_the_way_in_and_out(device):
    check(kernel.transport_triton, make(2, 17, 20, 9, dtype=torch.bfloat16), FULL, device)


@pytest.mark.parametrize("scale", [1e4, 1e-3, 1e-40])
def test_the_scale_of_the_features_does_not_matter(scale, device):
    check(kernel.transport_triton, make(2, 17, 20, 9, scale=scale), FULL, device)


@pytest.mark.parametrize("settings", FEW)
@pytest.mark.parametrize("small", [64, 0])
def test_what_all_points_have_in_common_costs_no_digits(settings, small, device, monkeypatch):
    monkeypatch.setattr(kernel, "MOST_SMALL", small)
    (x, y), others, upstream = make(2, 9, 7, 5)
    exact = tuple((points * 1024).round() / 1024 for points in (x, y))  # plus 8192 these are floats
    check(kernel.transport_triton, (exact, others, upstream), settings, device, offset=8192.0)


def test_points_that_are_not_contiguous(device):
    (x, y), others, upstream = make(2, 17, 20, 9)
    check(
        kernel.transport_triton,
        ((x.transpose(0, 2).contiguous().transpose(0, 2), y), others, upstream),
        FULL,
        device,
    )


def test_stacked_runs_are_single_runs(device):
    runs = [make(2, 9, 7, 5, seed=seed) for seed in range(3)]

    def slopes(x, y, a, b):
        return grad(lambda p, q: kernel.transport_triton(p, q, a, b, None, *FULL)[0].sum(), (0, 1))(x, y)

    tensors = [(*leaves, *others[:2]) for leaves, others, _ in runs]
    stacked = [torch.stack(parts).to(device) for parts in zip(*tensors, strict=True)]
    found = vmap(slopes)(*stacked)
    for number in range(3):
        for ours, theirs in zip(found, slopes(*(part[number] for part in stacked)), strict=True):
            torch.testing.assert_close(ours[number], theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "streamed"),
    [
        ("u = tl.where(log_a > -1e29, log_a - incoming, -1e30)", "u = tl.where(log_a > -1e29, 0.9 * log_a - incoming, -1e30)", False),  # noqa: E501
        ("dummy_u = rest - _lse(v, 0)", "dummy_u = rest + _lse(v, 0)", False),
        ("found = _join(found, tl.load(dummy + problem))", "found = found", True),
        ("total = total * tl.exp(top - new) + ", "total = total + ", True),
        ("cost *= tl.exp(exponent - cost *", "cost *= tl.exp(exponent - 0.99 * cost *", False),
        ("weight = tl.where(away > least, weight / away, 0.0)", "weight = tl.where(away > least, weight, 0.0)", False),
        ("by_y += part.sum(1)[..., None] * wide_y -", "by_y += part.sum(1)[..., None] * wide_y +", False),
        ("by_y += part.sum(1)", "by_y = part.sum(1)", False),
    ],
)  # fmt: skip
def test_a_planted_error_is_found(old, new, streamed, device):
    wrong = planted(kernel, old, new)
    wrong._SLAB = 16
    if streamed:
        wrong.MOST_SMALL = 0
    with pytest.raises(AssertionError):
        check(wrong.transport_triton, make(2, 17, 33, 5), FEW[1], device)


def test_sums_of_a_full_plan_are_its_masses():
    (x, y), (a, b, _), _ = make(2, 9, 7, 3)
    plan = transport_plan(x.double(), y.double(), a=a.double(), b=b.double(), iterations=2000)
    torch.testing.assert_close(plan.sum(2), a.double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(plan.sum(1), b.double(), rtol=1e-6, atol=1e-9)


def test_little_regularisation_is_the_exact_plan_of_a_linear_program():
    linprog = pytest.importorskip("scipy.optimize", reason="a GPU machine has pytest alone").linprog
    (x, y), _, _ = make(1, 5, 5, 2)
    cost = costs(x.double(), y.double(), "squared")[0]
    cost = cost / cost.mean()
    rows = torch.block_diag(*[torch.ones(1, 5)] * 5)
    columns = torch.eye(5).repeat(1, 5)
    sums = torch.cat([rows, columns]).numpy()
    exact = linprog(cost.flatten().numpy(), A_eq=sums, b_eq=[0.2] * 10, method="highs")
    found = transport_loss(x.double(), y.double(), epsilon=0.002, iterations=5000)
    assert found.item() == pytest.approx(exact.fun, rel=5e-3)


def test_partial_transport_leaves_junk_where_it_is():
    """The check of specs/extended.md 8.2: 8 of 32 targets are junk and 0.6 of the mass is to move."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 32, 16, generator=generator).double()
    x = y + 0.05 * torch.randn(1, 32, 16, generator=generator).double()
    y[:, 24:] = 8.0 + torch.randn(1, 8, 16, generator=generator).double()
    partial = transport_plan(x, y, epsilon=0.03, mass=0.6, iterations=50, metric="euclidean")
    full = transport_plan(x, y, epsilon=0.03, iterations=50, metric="euclidean")
    assert partial.sum().item() == pytest.approx(0.6, abs=1e-4)
    assert transport_plan(x, y, epsilon=0.03, mass=0.6, iterations=20).sum().item() == pytest.approx(
        0.6, abs=2e-3
    )
    assert partial[:, :, 24:].sum() < 1e-5
    assert partial.diagonal(dim1=1, dim2=2)[:, :24].sum().item() == pytest.approx(0.6, abs=0.01)
    assert full[:, :, 24:].sum().item() == pytest.approx(0.25, abs=1e-3)


def test_the_envelope_theorem_gives_the_gradient_of_the_regularised_optimum():
    (x, y), (a, b, _), _ = make(1, 4, 5, 3)
    x, y, a, b = (t.double() for t in (x[:, :3], y, a[:, :3] / a[:, :3].sum(), b))
    scale = costs(x, y, "squared").mean()

    def optimum(points):
        cost = costs(points, y, "squared") / scale
        u, v = potentials(cost / 0.1, a, b, 1.0, 3000)
        plan = plan_of(cost / 0.1, u, v)
        return (plan * cost).sum() + 0.1 * (plan * (plan.clamp(min=1e-300).log() - 1)).sum()

    found = torch.autograd.grad(
        transport_loss(x.requires_grad_(), y, a=a, b=b, epsilon=0.1, iterations=3000).sum(), x
    )[0]
    for i, f in ((0, 0), (2, 1)):
        step = torch.zeros_like(x)
        step[0, i, f] = 1e-5
        with torch.no_grad():
            slope = (optimum(x + step) - optimum(x - step)) / 2e-5
        assert found[0, i, f].item() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("metric", ["squared", "euclidean"])
def test_the_costs_are_differentiable(metric):
    """All that has a gradient: the plan is a constant, and what that means is tested above and below."""
    (x, y), (_, _, prior), _ = make(2, 4, 3, 3, prior=True)
    points = tuple(t.double().requires_grad_() for t in (x, y))
    assert torch.autograd.gradcheck(lambda a, b: costs(a, b, metric, prior.double()), points)


def test_the_gradient_with_the_plan_held_fixed():
    (x, y), (a, b, prior), _ = make(1, 4, 5, 3, prior=True)
    x, y = x.double().requires_grad_(), y.double().requires_grad_()
    arguments = (a.double(), b.double(), prior.double(), *PARTIAL)
    plan = transport_plan(
        x,
        y,
        a=arguments[0],
        b=arguments[1],
        prior=arguments[2],
        epsilon=0.2,
        mass=0.6,
        iterations=PARTIAL[2],
        metric="euclidean",
    )
    scale = costs(x.detach(), y.detach(), "euclidean", prior.double()).mean()
    expected = torch.autograd.grad((plan * costs(x, y, "euclidean") / scale).sum(), (x, y))
    found = torch.autograd.grad(transport_reference(x, y, *arguments).sum(), (x, y))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def lasso(problems=2, n=12, m=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(problems, n, m, generator=generator)
    groups = torch.arange(n).remainder(3).expand(problems, -1)
    return cost, groups, torch.full((problems,), 0.1), torch.tensor([0.5, 2.0][:problems])


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (12, 7), (63, 40)])
def test_the_group_lasso_kernel_is_the_reference(size, device):
    """As in ``check``, with T updates a step of the majorisation: h_0 = (2 T + 1) (n + 8 + 2 U) eps.

    A relative error h of the plan becomes one of h / 2 of the penalty, at most W = 0.5 / sqrt(1e-3), and so
    eta W h / 2 epsilon of the next exponent; potentials follow it: h_k+1 = h_0 + eta W h_k / epsilon.
    """
    cost, groups, _, _ = lasso(2, *size)
    groups = torch.where(groups == 1, 2, groups)  # a class without rows
    epsilon, eta = torch.full((2,), 0.5), torch.tensor([0.1, 0.2])
    a, b = (torch.full((2, count), 1.0 / count) for count in size)
    exact = group_lasso_reference(
        cost.double(), a.double(), b.double(), groups, epsilon.double(), eta.double(), 4, 20
    )
    given = (t.to(device) for t in (cost, a, b, groups, epsilon, eta))
    found = kernel_group_lasso.group_lasso_triton(*given, 4, 20)
    grown = 0.2 * 0.5 / 1e-3**0.5 / 0.5
    begin = 41 * (max(size) + 8 + 2 * (1.0 / 0.5 + grown)) * EPS32
    assert_within(found, exact, exact * begin * sum(grown**k for k in range(4)), "plan")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(base + weight * penalty) * cold", "(base + 0.99 * weight * penalty) * cold"),
        ("+ 1e-3)\n    tl.store(plan_out", "+ 2e-3)\n    tl.store(plan_out"),
    ],
)
def test_a_planted_error_in_the_group_lasso_is_found(old, new, device):
    wrong = planted(kernel_group_lasso, old, new)
    cost, groups, epsilon, eta = (t.to(device) for t in lasso())
    a, b = (torch.full((2, count), 1.0 / count, device=device) for count in (12, 7))
    right = group_lasso_reference(cost, a, b, groups, epsilon, eta, 5, 20)
    found = wrong.group_lasso_triton(cost, a, b, groups, epsilon, eta, 5, 20)
    assert (found - right).abs().max() > 1e-4


def test_the_group_lasso_draws_every_column_to_one_group():
    cost, groups, epsilon, _ = lasso()

    def spread(eta):
        plan = group_lasso_plan(cost, groups, epsilon=epsilon, eta=torch.full((2,), eta))
        torch.testing.assert_close(plan.sum(1), torch.full((2, 7), 1 / 7), rtol=1e-3, atol=1e-5)
        by_group = torch.stack([plan[:, groups[0] == g].sum(1) for g in range(3)])
        return (by_group.amax(0) / by_group.sum(0)).mean().item()

    assert spread(1.0) > spread(0.0) + 0.1


def test_no_penalty_is_plain_transport():
    cost, groups, epsilon, _ = lasso()
    plan = group_lasso_plan(cost, groups, epsilon=epsilon, eta=torch.zeros(2), outer=3)
    even = [torch.full((2, count), 1.0 / count) for count in (12, 7)]
    scaled = cost / epsilon[:, None, None]
    torch.testing.assert_close(
        plan, plan_of(scaled, *potentials(scaled, *even, 1.0, 200)), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x: transport_loss(x, x[0]), ShapeError, "problems, N, F"),
        (lambda x: transport_loss(x, x, a=torch.ones(2)), ShapeError, r"a must be \(2, 3\)"),
        (lambda x: transport_loss(x, x, prior=torch.ones(2, 3, 4)), ShapeError, "prior must be"),
        (lambda x: transport_loss(x, x, mass=0.0), ConfigError, "mass in 0 to 1"),
        (lambda x: transport_loss(x, x, metric="cosine"), ConfigError, "squared, euclidean"),
        (lambda x: group_lasso_plan(x, torch.zeros(2, 4), epsilon=x[:, 0, 0], eta=x[:, 0, 0]), ShapeError, "groups"),
        (lambda x: group_lasso_plan(x, torch.zeros(2, 3), epsilon=x[:, 0, 0], eta=x[:, 0, 0], outer=0), ConfigError, "one step"),  # noqa: E501
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.zeros(2, 3, 4))
