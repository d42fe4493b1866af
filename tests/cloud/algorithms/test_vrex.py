"""VREx: what it is without its penalty, its gradient by the closed form, and the change of its weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import batch, build, model, step
from wearfleet_cloud.algorithms.base import Batch
from wearfleet_cloud.algorithms.penalised import STEP
from wearfleet_cloud.training.optimisers import Adam, Sgd


def test_vrex_without_penalty_is_erm() -> None:
    vrex, erm = build("vrex", Sgd()), build("erm", Sgd())
    state, given = vrex.init(), batch(vrex)
    expected, plain = step(erm, erm.init(), given, 1)
    ours, metrics = step(vrex, state, given, 1, lam=0.0, anneal_steps=0.0)
    torch.testing.assert_close(vrex.inference(ours), erm.inference(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["loss"], plain["loss"], rtol=1e-5, atol=1e-6)


def test_equal_risks_cost_nothing() -> None:
    """Equal windows in all domains have equal risks; of one domain there is no variance either."""
    vrex = build("vrex", Sgd())
    given = batch(vrex)
    equal = Batch(given.x[:1].expand(3, -1, -1, -1), given.y[:1].expand(3, -1))
    assert float(step(vrex, vrex.init(), equal, 1)[1]["penalty"]) < 1e-12  # (rounding of a risk of about 1)^2
    alone = build("vrex", Sgd(), domains=1)
    assert float(step(alone, alone.init(), batch(alone, domains=1), 1)[1]["penalty"]) == 0.0


@pytest.mark.parametrize("lam", [0.0, 0.7, 30.0])
def test_the_gradient_is_that_of_the_risks_with_closed_form_weights(lam: float) -> None:
    """dL = sum_d m_d dR_d with m_d = (1 + 2 w (R_d - mean R)) / D, by plain torch in float64."""
    vrex = build("vrex", Sgd())
    state, given = vrex.init(), batch(vrex)
    twin = model().double()
    risks = torch.stack(
        [
            F.cross_entropy(logits, y)
            for logits, y in zip(twin(given.x.double().flatten(0, 1)).chunk(3), given.y, strict=True)
        ]
    )
    fixed = risks.detach()
    multipliers = (1.0 + 2.0 * lam * (fixed - fixed.mean())) / 3.0
    grads = torch.autograd.grad((multipliers * risks).sum(), tuple(twin.parameters()))
    ours, metrics = step(vrex, state, given, 1, lam=lam, anneal_steps=0.0, lr=1.0)
    for (name, before), slope in zip(state.params.items(), grads, strict=True):
        torch.testing.assert_close(before - ours.params[name], slope.float(), rtol=1e-3, atol=1e-5)
    expected = fixed.mean() + lam * (fixed - fixed.mean()).square().mean()
    torch.testing.assert_close(metrics["loss"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_weight_is_1_before_it_is_lam_and_the_optimiser_starts_anew_between() -> None:
    vrex = build("vrex", Adam())
    state, given = vrex.init(), batch(vrex)
    weights, counts = [], []
    for number in range(5):
        state, metrics = step(vrex, state, given, number, lam=20.0, anneal_steps=3.0)
        weights.append(float((metrics["loss"] - metrics["risk"]) / metrics["penalty"]))
        counts.append(float(state.slots["adam_step"]))
    assert weights == pytest.approx([1.0, 1.0, 1.0, 20.0, 20.0], rel=1e-3)
    assert counts == [1.0, 2.0, 3.0, 1.0, 2.0]
    assert float(state.buffers[STEP]) == 5.0
