"""FIX and FIXED: what they are without mixing, the margin's definition, and its two modes."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import batch, build, hyper, step
from torch import Tensor
from wearfleet_cloud.algorithms import build_algorithm
from wearfleet_cloud.algorithms.margin_risk import mixed_margin_risks
from wearfleet_cloud.algorithms.passes import embed, pooled
from wearfleet_cloud.kernels.margin import large_margin_reference
from wearfleet_cloud.training.optimisers import Sgd


def _network(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if "/" not in name}


def test_fix_without_mixing_and_reversal_is_erm_on_the_network() -> None:
    fix = build("fix", Sgd())
    erm = build_algorithm("erm", fix.model, Sgd(), domains=fix.domains)
    given = batch(fix)
    expected, plain = step(erm, erm.init(), given, 1)
    # With a tiny concentration lam is 0 or 1: every embedding stays as it is, in another order at most.
    ours, metrics = step(fix, fix.init(), given, 1, mixup_alpha=1e-4, reversal=0.0)
    torch.testing.assert_close(_network(ours.params), expected.params, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_network(ours.buffers), expected.buffers, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["risk"], plain["loss"], rtol=1e-5, atol=1e-6)


def test_the_reversal_pushes_the_network_against_the_discriminator_only() -> None:
    fix = build("fix", Sgd())
    state, given = fix.init(), batch(fix)
    moved = {
        reversal: step(fix, state, given, 1, mixup_alpha=1e-4, reversal=reversal)[0].params
        for reversal in (0.0, 1.0, 2.0)
    }
    conv, own = "backbone.conv1.weight", "domains/layer1.weight"
    one, two = (moved[reversal][conv] - moved[0.0][conv] for reversal in (1.0, 2.0))
    assert float(one.abs().max()) > 1e-4
    torch.testing.assert_close(two, 2.0 * one, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved[2.0][own], moved[0.0][own], rtol=0.0, atol=0.0)
    torch.testing.assert_close(moved[2.0]["head.weight"], moved[0.0]["head.weight"], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("mode", ["strict", "corrected"])
def test_fixed_risk_without_mixing_is_the_mean_margin_by_its_definition(mode: str) -> None:
    fixed = build("fixed", Sgd(), {"mode": mode, "top_k": "2"})
    state, given = fixed.init(), batch(fixed)
    _, metrics = step(fixed, state, given, 1, mixup_alpha=1e-4)
    x, y, _ = pooled(given)
    z, _ = embed(fixed.model, state.params, state.buffers, x, None, torch.tensor(1))
    weight, bias = state.params["head.weight"].double(), state.params["head.bias"].double()
    floor = 0.0 if mode == "strict" else 1e-3
    losses = large_margin_reference(z.double(), weight, bias, y[:, None], 10.0, 2, "mean", floor)
    # float32 features of a batch-normalised network: a thousand roundings of 6e-8 at most
    torch.testing.assert_close(metrics["risk"].double(), losses.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.05, 1.0, 100.0])
def test_margin_risk_and_its_slope_are_those_of_the_definition(gamma: float) -> None:
    generator = torch.Generator().manual_seed(3)
    z = (4.0 * torch.randn(9, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 4, (9, 2), generator=generator)
    shares = torch.rand(9, 2, generator=generator, dtype=torch.float64)
    limit = torch.tensor(gamma, dtype=torch.float64)
    logits = (z @ weight.T + bias).unflatten(0, (3, 3))
    domains = labels.unflatten(0, (3, 3)), shares.unflatten(0, (3, 3))
    ours = mixed_margin_risks(logits, weight, *domains, limit, top_k=2, mode="strict")
    losses = large_margin_reference(z, weight, bias, labels, gamma, 2, "mean", 0.0)
    clipped = (losses == -gamma).sum() + (losses == 3.0 * gamma).sum()
    assert int(clipped) > 0 if gamma < 1.0 else int(clipped) < losses.numel()
    expected = (losses * shares).sum(dim=1).reshape(3, 3).mean(dim=1)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    leaves = (z, weight, bias)
    slopes = [
        torch.autograd.grad(value @ torch.arange(1.0, 4.0).double(), leaves) for value in (ours, expected)
    ]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-8, atol=1e-10)


def test_strict_mode_explodes_where_the_softmax_is_sure_and_corrected_does_not() -> None:
    """P31: delta / slope grows without bound, in effect unclipped with gamma 1e5."""
    weight, logits = torch.eye(3, 4), torch.tensor([[[14.0, 0.0, 0.0]]])
    labels, shares = torch.tensor([[[1, 1]]]), torch.tensor([[[0.5, 0.5]]])
    risks = {
        mode: float(mixed_margin_risks(logits, weight, labels, shares, torch.tensor(1e5), top_k=1, mode=mode))
        for mode in ("strict", "corrected")
    }
    assert risks["strict"] > 1e4
    assert 0.0 < risks["corrected"] <= 1000.0


def test_a_window_of_weight_zero_is_absent() -> None:
    generator = torch.Generator().manual_seed(4)
    logits, weight = torch.randn(2, 6, 4, generator=generator), torch.randn(4, 5, generator=generator)
    labels = torch.randint(0, 4, (2, 6, 2), generator=generator)
    shares = torch.rand(2, 6, 2, generator=generator)
    limit, present = torch.tensor(10.0), torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]] * 2)
    ours = mixed_margin_risks(logits, weight, labels, shares, limit, top_k=1, mode="strict", weight=present)
    short = logits[:, :4], weight, labels[:, :4], shares[:, :4]
    alone = mixed_margin_risks(*short, limit, top_k=1, mode="strict")
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fix", "fixed"])
def test_every_step_mixes_anew(name: str) -> None:
    algorithm = build(name, Sgd())
    state, given = algorithm.init(), batch(algorithm)
    risks = {
        float(algorithm.step(state, given, hyper(algorithm, mixup_alpha=1.0), torch.tensor(key))[1]["risk"])
        for key in range(4)
    }
    assert len(risks) == 4
