"""Mixup: what it is without mixing, and what is mixed with what."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import batch, build, step
from wearfleet_cloud.algorithms.base import Batch
from wearfleet_cloud.algorithms.mixup import mix
from wearfleet_cloud.training.optimisers import Sgd


def test_mixup_without_mixing_is_erm() -> None:
    erm, mixup = build("erm", Sgd()), build("mixup", Sgd())
    state, given = erm.init(), batch(erm)
    expected, plain = step(erm, state, given, 1)
    # With a tiny concentration lam is 0 or 1: either way every window stays as it is.
    ours, metrics = step(mixup, state, given, 1, alpha=1e-4)
    torch.testing.assert_close(tuple(ours), tuple(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["loss"], plain["loss"], rtol=1e-5, atol=1e-6)


def test_domain_mixup_of_equal_domains_without_mixing_is_erm_with_frozen_norms() -> None:
    """Each pair has a lam of its own, 0 or 1 here, so that only with equal domains each window counts once."""
    mixup, erm = build("mixup", Sgd(), {"pairing": "domain"}), build("erm", Sgd())
    mixup.model.eval(), erm.model.eval()
    one = batch(erm)
    one = Batch(one.x[:1], one.y[:1])
    state, three = erm.init(), Batch(one.x.expand(3, -1, -1, -1), one.y.expand(3, -1))
    expected, plain = step(erm, state, one, 1)
    ours, metrics = step(mixup, state, three, 1, alpha=1e-4)
    torch.testing.assert_close(tuple(ours), tuple(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["loss"], plain["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pairing", ["batch", "domain"])
def test_mixup_draws_anew_each_step(pairing: str) -> None:
    mixup = build("mixup", Sgd(), {"pairing": pairing})
    state, given = mixup.init(), batch(mixup)
    losses = {float(step(mixup, state, given, key, alpha=1.0)[1]["loss"]) for key in range(4)}
    assert len(losses) == 4


def test_mix_combines_windows_and_keeps_both_labels() -> None:
    ones, threes = (
        Batch(torch.ones(2, 1, 1, 2), torch.zeros(2, 1)),
        Batch(3 * torch.ones(2, 1, 1, 2), torch.ones(2, 1)),
    )
    mixed = mix(ones, threes, torch.tensor([1.0, 0.25]))
    assert mixed.x[:, 0, 0, 0].tolist() == [1.0, 2.5]
    assert mixed.y.tolist() == [[0.0], [0.0]]
    assert mixed.other.tolist() == [[1.0], [1.0]]
    assert mixed.weight is None
    weighted = mix(
        ones._replace(weight=torch.tensor([[1.0], [0.0]])),
        threes._replace(weight=torch.ones(2, 1)),
        mixed.lam,
    )
    assert weighted.weight is not None
    assert weighted.weight.tolist() == [[1.0], [0.0]]
