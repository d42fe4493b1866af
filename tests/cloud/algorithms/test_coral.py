"""CORAL: what it is without its penalty, whose statistics it uses, and that it does what it is for."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import batch, build, step
from torch.func import functional_call
from wearfleet_cloud.training.optimisers import Adam, Sgd


def test_coral_without_penalty_is_domain_averaged_erm_with_frozen_norms() -> None:
    coral, erm = build("coral", Sgd()), build("erm", Sgd())
    coral.model.eval(), erm.model.eval()
    state, given = erm.init(), batch(erm)
    expected, plain = step(erm, state, given, 1)
    ours, metrics = step(coral, state, given, 1, gamma=0.0)
    torch.testing.assert_close(tuple(ours), tuple(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["risk"], plain["loss"], rtol=1e-5, atol=1e-6)


def test_coral_normalises_every_domain_by_its_own_batch() -> None:
    coral = build("coral", Sgd())
    state, given = coral.init(), batch(coral)
    after, metrics = step(coral, state, given, 1, gamma=0.0)
    tensors = {**state.params, **state.buffers}
    risks = [
        F.cross_entropy(functional_call(coral.model, tensors, (x,)), y)
        for x, y in zip(given.x, given.y, strict=True)
    ]
    torch.testing.assert_close(metrics["risk"], torch.stack(risks).mean().detach(), rtol=1e-5, atol=1e-6)
    assert int(after.buffers["backbone.norm1.num_batches_tracked"]) == 3
    torch.testing.assert_close(after.buffers, {n: tensors[n] for n in after.buffers}, rtol=1e-5, atol=1e-6)


def test_coral_makes_the_domains_more_alike() -> None:
    final = {}
    for gamma in (0.0, 10.0):
        coral = build("coral", Adam())
        state, given = coral.init(), batch(coral, windows=16)
        for number in range(60):
            state, metrics = step(coral, state, given, number, gamma=gamma, lr=0.003)
        final[gamma] = float(metrics["penalty"])
    assert final[10.0] < 0.5 * final[0.0]
