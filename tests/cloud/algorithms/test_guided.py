"""Mixup-guided: the closed form against a search, and the step against gradients of plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import batch, build, hyper, started, step
from torch import Tensor
from wearfleet_cloud.algorithms.guided import METHODS, pareto_share
from wearfleet_cloud.algorithms.penalised import Penalised
from wearfleet_cloud.training.optimisers import Sgd


def _products(g: Tensor) -> Tensor:
    return g @ g.T


@pytest.mark.parametrize("seed", range(40))
def test_the_share_is_the_best_of_a_search(seed: int) -> None:
    """Against 100 001 values of w, in float64; all is linear in w, so that the error is a grid step times the slope."""
    g = torch.randn(3, 2 + seed % 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    products, w = _products(g), torch.linspace(0.0, 1.0, 100_001, dtype=torch.float64)
    v = w[:, None] * g[0] + (1.0 - w)[:, None] * g[1]
    safe = (v @ g[0] >= 0.0) & (v @ g[1] >= 0.0)
    gains = torch.where(safe, v @ g[2], -torch.inf)
    share = float(pareto_share(products))
    found = share * g[0] + (1.0 - share) * g[1]
    slope = float((g[2] @ (g[0] - g[1])).abs())
    assert float(found @ g[0]) >= -1e-12
    assert float(found @ g[1]) >= -1e-12
    if float(gains.max()) > 1e-5 * slope:
        assert float(found @ g[2]) >= float(gains.max()) - 1e-12
        assert float(found @ g[2]) <= float(gains.max()) + 1e-5 * slope
    else:
        assert float(found.norm()) <= float(v.norm(dim=1).min()) + 1e-12


def test_the_search_meets_both_cases() -> None:
    """With the seeds above some guides can be followed and some cannot, and some gradients conflict."""
    cases = set()
    for seed in range(40):
        g = torch.randn(3, 2 + seed % 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        products = _products(g)
        share = pareto_share(products)
        followed = bool(share * products[2, 0] + (1.0 - share) * products[2, 1] > 0.0)
        cases.add((followed, bool(products[0, 1] < 0.0)))
    assert len(cases) == 4


@pytest.mark.parametrize(
    ("g", "share"),
    [
        ([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], 1.0),  # nothing in the way: all for the guide's favourite
        ([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]], 0.0),
        ([[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], 0.2),  # neither helps: shortest, (0.4, 0.8)
        ([[1.0, 0.0], [-1.0, 1.0], [1.0, 0.0]], 2.0 / 3.0),  # up to where the penalty would rise
        ([[1.0, 0.0], [-1.0, 1.0], [0.0, 1.0]], 0.5),  # down to where the risk would
        ([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], 1.0),  # a penalty without slope
        ([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], 0.0),
    ],
)
def test_known_shares(g: list, share: float) -> None:
    assert float(pareto_share(_products(torch.tensor(g)))) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_goes_along_the_weighed_gradients_of_the_method(method: str) -> None:
    guided = build("guided", Sgd(), {"method": method})
    assert isinstance(guided.inner, Penalised)
    state, given = started(guided), batch(guided, windows=8)
    after, metrics = step(guided, state, given, 2, lr=1.0)
    params = {n: p.clone().requires_grad_() for n, p in state.params.items()}
    found = guided.inner.losses(params, state.buffers, given, hyper(guided.inner), torch.tensor(2))
    values = list(params.values())
    rows = [
        torch.autograd.grad(t, values, retain_graph=True, materialize_grads=True)
        for t in (found.risk, found.penalty)
    ]
    share = float(metrics["share"])
    assert 0.0 <= share <= 1.0
    for name, g1, g2 in zip(params, *rows, strict=True):
        mine = (
            share * g1 + (1.0 - share) * g2 if not name.startswith("head.") and "/" not in name else g1 + g2
        )
        torch.testing.assert_close(state.params[name] - after.params[name], mine, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(metrics["loss"], found.risk.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.buffers, found.buffers, rtol=1e-5, atol=1e-6)


def test_the_guide_is_the_risk_on_mixtures_of_different_domains() -> None:
    """With lam of 0 or 1 the mixtures are the windows themselves, each domain twice, once or not at all."""
    guided = build("guided", Sgd(), {"method": "vrex"})
    guided.model.eval()
    state, given = started(guided), batch(guided)
    with torch.no_grad():
        risks = [float(F.cross_entropy(guided.model(x), y)) for x, y in zip(given.x, given.y, strict=True)]
    possible = {round((2 * a + b) / 3.0, 4) for a in risks for b in risks} | {round(sum(risks) / 3.0, 4)}
    guides = {
        round(float(step(guided, state, given, key, concentration=1e-4)[1]["guide"]), 4) for key in range(6)
    }
    assert all(min(abs(g - p) for p in possible) < 2e-4 for g in guides)
    assert len(guides) > 1
