"""DANN: what it is without reversal, which way each part moves, and that it does what it is for."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from algorithm_cases import DOMAINS, batch, build, step
from wearfleet_cloud.algorithms.base import Batch
from wearfleet_cloud.algorithms.passes import call_part, embed
from wearfleet_cloud.training.optimisers import Adam, Sgd


def test_dann_without_reversal_is_erm_in_the_network_that_predicts() -> None:
    dann, erm = build("dann", Sgd(momentum=0.9)), build("erm", Sgd(momentum=0.9))
    state, given = dann.init(), batch(dann)
    expected, plain = step(erm, erm.init(), given, 1)
    ours, metrics = step(dann, state, given, 1, alpha=0.0)
    torch.testing.assert_close(dann.inference(ours), erm.inference(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["risk"], plain["loss"], rtol=1e-5, atol=1e-6)
    moved = [n for n, p in ours.params.items() if "/" in n and not torch.equal(p, state.params[n])]
    assert "discriminator/layer1.weight" in moved


def test_what_the_features_get_is_linear_in_alpha_and_the_discriminator_does_not_notice() -> None:
    dann = build("dann", Sgd())
    state, given = dann.init(), batch(dann)
    none, half, whole = (step(dann, state, given, 1, alpha=alpha)[0].params for alpha in (0.0, 0.5, 1.0))
    name = "backbone.conv2.weight"
    assert not torch.equal(none[name], whole[name])
    torch.testing.assert_close(none[name] - half[name], (none[name] - whole[name]) / 2, rtol=1e-3, atol=1e-7)
    for name in none:
        if "/" in name:
            torch.testing.assert_close(none[name], whole[name], rtol=0.0, atol=0.0)


def _fresh(seed: int) -> Batch:
    """New windows in every step; the class lifts channel 0, the domain channel 1."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (DOMAINS, 16), generator=generator)
    x = torch.randn(DOMAINS, 16, 3, 40, generator=generator)
    x[:, :, 0] += 0.5 * y[:, :, None]
    x[:, :, 1] += 0.5 * torch.arange(DOMAINS)[:, None, None]
    return Batch(x, y)


@pytest.mark.slow
def test_dann_hides_the_domain() -> None:
    """The discriminator, which learns all the time, finds domains half again as hard to tell, or harder."""
    told = {}
    for alpha in (0.0, 1.0):
        dann = build("dann", Adam())
        state, risks = dann.init(), []
        for number in range(120):
            state, metrics = step(dann, state, _fresh(number), number, alpha=alpha, lr=0.003)
            risks.append(float(metrics["penalty"]))
        told[alpha] = fmean(risks[40:])
    assert told[1.0] > 1.5 * told[0.0]


def test_the_discriminator_sees_features_and_numbers_of_all_domains() -> None:
    dann = build("dann", Sgd())
    state, given = dann.init(), batch(dann)
    _, metrics = step(dann, state, given, 1)
    features, _ = embed(dann.model, state.params, state.buffers, given.x.flatten(0, 1), None, torch.tensor(1))
    logits, _ = call_part("discriminator", dann.parts["discriminator"], state.params, state.buffers, features)
    labels = torch.tensor([d for d in range(DOMAINS) for _ in range(6)])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(metrics["penalty"], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["loss"], metrics["risk"] + metrics["penalty"], rtol=1e-6, atol=0.0)
