"""AND-mask: what may move, what it is without a mask, and that the order of the domains does not matter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import batch, build, step
from torch.func import functional_call
from wearfleet_cloud.algorithms import Batch
from wearfleet_cloud.algorithms.and_mask import agreed
from wearfleet_cloud.training.optimisers import Adam, Sgd


def test_without_a_mask_it_is_erm() -> None:
    masked, erm = build("and-mask", Sgd()), build("erm", Sgd())
    state, given = erm.init(), batch(erm)
    expected, plain = step(erm, state, given)
    ours, metrics = step(masked, state, given, tau=0.0)
    assert float(metrics["agreement"]) == 1.0
    torch.testing.assert_close(tuple(ours), tuple(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["loss"], plain["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_a_step_is_that_of_the_definition(tau: float) -> None:
    masked = build("and-mask", Sgd())
    masked.model.double()
    state, given = masked.init(), batch(masked)
    given = given._replace(x=given.x.double())
    params = {n: p.clone().requires_grad_() for n, p in state.params.items()}
    logits = functional_call(masked.model, {**params, **state.buffers}, (given.x.flatten(0, 1),))
    risks = [F.cross_entropy(part, y) for part, y in zip(logits.split(6), given.y, strict=True)]
    grads = [torch.autograd.grad(r, list(params.values()), retain_graph=True) for r in risks]
    rate = {"lr": torch.tensor(1.0).double(), "tau": torch.tensor(tau)}
    after, _ = masked.step(state, given, rate, torch.tensor(0))
    for name, *per_domain in zip(params, *grads, strict=True):
        if name in {"backbone.conv1.bias", "backbone.conv2.bias"}:
            continue  # before a normalisation: exactly 0 in theory, so that its signs are those of rounding
        numbers = [g.flatten().tolist() for g in per_domain]
        moved = [
            sum(g) / 3.0 if abs(sum((v > 0) - (v < 0) for v in g)) / 3.0 >= tau else 0.0
            for g in zip(*numbers, strict=True)
        ]
        share = sum(m != 0.0 for m in moved) / len(moved)
        expected = torch.tensor(moved, dtype=torch.float64) / (1e-10 + share)
        found = (state.params[name] - after.params[name]).flatten()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_order_of_the_domains_does_not_matter() -> None:
    masked = build("and-mask", Sgd())
    state, given = masked.init(), batch(masked)
    order = torch.tensor([2, 0, 1])
    first, second = (step(masked, state, b) for b in (given, Batch(given.x[order], given.y[order])))
    for name in ("loss", "accuracy"):
        torch.testing.assert_close(first[1][name], second[1][name], rtol=1e-5, atol=1e-6)
    head = ["head.weight", "head.bias"]
    torch.testing.assert_close(
        [first[0].params[n] for n in head], [second[0].params[n] for n in head], rtol=1e-4, atol=1e-5
    )


def test_signs_agree_when_enough_of_them_are_equal() -> None:
    grads = torch.tensor([[1.0, 2.0, -1.0, 0.0], [3.0, -1.0, -2.0, 1.0], [0.1, 5.0, -3.0, 2.0]])
    assert agreed(grads, torch.tensor(1.0)).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert agreed(grads, torch.tensor(0.5)).tolist() == [1.0, 0.0, 1.0, 1.0]
    assert agreed(grads, torch.tensor(1.0 / 3.0)).tolist() == [1.0] * 4


def test_what_domains_contradict_each_other_on_is_moved_by_weight_decay_alone() -> None:
    """The same windows, labelled 0 by one domain and 1 by the other: their gradients of both rows have other signs."""
    for decay in (0.0, 0.1):
        masked = build("and-mask", Adam(weight_decay=decay), domains=2)
        state = masked.init()
        state.params["head.weight"][1] = state.params["head.weight"][0]
        one = batch(masked, domains=2)
        labels = torch.tensor([[0], [1]]).expand(2, 6)
        after, _ = step(masked, state, Batch(one.x[:1].expand(2, -1, -1, -1), labels))
        moved = (after.params["head.weight"] - state.params["head.weight"]).count_nonzero(dim=1)
        assert moved[2:].all()
        assert moved[:2].any() == (decay > 0.0)
