"""AFFAR (our reconstruction): its loss by loops in float64, and what each of its terms does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import CLASSES, DOMAINS, batch, build, model, step
from torch import Tensor
from wearfleet_cloud.kernels.mmd import median_gammas, mmd_reference
from wearfleet_cloud.training.optimisers import Adam, Sgd
from wearfleet_models import Classifier


def _by_loops(network: Classifier, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K), common branch (B, W) and domain logits (B, S), window by window and branch by branch."""
    tensors = dict(network.named_parameters())
    features = network.backbone(network.standardise(x), None, None)
    rows = []
    for f in features:
        told = tensors["neck.domain.weight"] @ f + tensors["neck.domain.bias"]
        common = torch.relu(tensors["neck.invariant.weight"] @ f + tensors["neck.invariant.bias"])
        fused = common
        for a, share in enumerate(torch.exp(told) / torch.exp(told).sum()):
            weight, bias = tensors["neck.branches.weight"][a], tensors["neck.branches.bias"][a]
            fused = fused + share * torch.relu(weight @ f + bias)
        rows.append((tensors["head.weight"] @ fused + tensors["head.bias"], common, told))
    logits, commons, tolds = (torch.stack(part) for part in zip(*rows, strict=True))
    return logits, commons, tolds


@pytest.mark.parametrize(("lam", "beta"), [(0.0, 0.0), (0.7, 0.0), (0.0, 3.0), (0.7, 3.0)])
def test_loss_and_gradient_are_those_of_the_equations(lam: float, beta: float) -> None:
    """With both weights 0 (T1) it is ERM on its network."""
    affar = build("affar", Sgd())
    state, given = affar.init(), batch(affar)
    twin = model("affar").double().train()
    logits, common, told = _by_loops(twin, given.x.double().flatten(0, 1))
    risk = F.cross_entropy(logits, given.y.flatten())
    domain_risk = F.cross_entropy(told, torch.arange(DOMAINS).repeat_interleave(6))
    grouped = common.reshape(DOMAINS, 6, -1)
    discrepancy = mmd_reference(grouped, median_gammas(grouped))
    slopes = torch.autograd.grad(risk + lam * domain_risk + beta * discrepancy, tuple(twin.parameters()))
    after, metrics = step(affar, state, given, 1, lam=lam, beta=beta, lr=1.0)
    expected = {"risk": risk, "domain_risk": domain_risk, "discrepancy": discrepancy}
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name].double(), value.detach(), rtol=1e-4, atol=1e-5)
    for (name, parameter), slope in zip(twin.named_parameters(), slopes, strict=True):
        assert state.params[name].shape == parameter.shape
        moved = (state.params[name] - after.params[name]).double()
        torch.testing.assert_close(moved, slope, rtol=2e-3, atol=2e-5)


def test_its_network_has_a_branch_for_every_source_domain_and_predicts_by_itself() -> None:
    affar = build("affar", Sgd(), domains=2)
    assert affar.model.spec.domains == 2
    assert affar.init().params["neck.branches.weight"].shape[0] == 2
    given = batch(affar, domains=2)
    twin = model("affar", domains=2).double().train()
    x = given.x.double().flatten(0, 1)
    torch.testing.assert_close(twin(x), _by_loops(twin, x)[0], rtol=1e-9, atol=1e-12)
    assert twin(x).shape == (12, CLASSES)


def _final(lam: float, beta: float, name: str, steps: int = 60) -> float:
    affar = build("affar", Adam())
    state, given = affar.init(), batch(affar, windows=16)
    for number in range(steps):
        state, metrics = step(affar, state, given, number, lam=lam, beta=beta, lr=0.003)
    return float(metrics[name])


def test_each_weight_does_what_it_is_for() -> None:
    assert _final(1.0, 0.0, "domain_risk") < 0.5 * _final(0.0, 0.0, "domain_risk")
    # A fifth of it (0.17 to 0.21 on four batches). Not longer: after 20 steps most windows have no active feature left,
    # the median distance is 0, and what the kernels then see is rounding.
    assert _final(0.0, 10.0, "discrepancy", 10) < 0.3 * _final(0.0, 0.0, "discrepancy", 10)
