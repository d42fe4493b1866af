"""GroupDRO: what it is with equal shares, how the shares move, and that they survive a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import DOMAINS, batch, build, model, step
from torch import Tensor
from wearfleet_cloud.algorithms.base import Batch, State
from wearfleet_cloud.algorithms.group_dro import LOG_SHARES
from wearfleet_cloud.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from wearfleet_cloud.training.optimisers import Sgd


def _shares(state: State) -> Tensor:
    return state.buffers[LOG_SHARES].exp()


def _risks(given: Batch) -> Tensor:
    """(D,) risk of every domain under the initial network, each normalised by its own batch."""
    alone = [
        step(build("erm", Sgd()), build("erm", Sgd()).init(), Batch(x[None], y[None]))[1]["loss"]
        for x, y in zip(given.x, given.y, strict=True)
    ]
    return torch.stack(alone)


def test_group_dro_with_eta_0_is_domain_averaged_erm_with_frozen_norms() -> None:
    ours, erm = build("group-dro", Sgd()), build("erm", Sgd())
    ours.model.eval(), erm.model.eval()
    given = batch(erm)
    expected, plain = step(erm, erm.init(), given, 1)
    after, metrics = step(ours, ours.init(), given, 1, eta=0.0)
    torch.testing.assert_close(ours.inference(after), erm.inference(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["loss"], plain["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(_shares(after), torch.full((DOMAINS,), 1.0 / DOMAINS), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("eta", [0.01, 1.0, 50.0])
def test_shares_sum_to_1_and_are_ordered_as_the_risks(eta: float) -> None:
    """T8, on the first step, where all shares were equal."""
    ours = build("group-dro", Sgd())
    given = batch(ours)
    after, metrics = step(ours, ours.init(), given, 1, eta=eta)
    shares, risks = _shares(after), _risks(given)
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-6)
    assert shares.argsort().tolist() == risks.argsort().tolist()
    expected = torch.softmax(eta * risks, dim=0)
    torch.testing.assert_close(shares, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["loss"], (expected * risks).sum(), rtol=1e-4, atol=1e-6)
    assert float(metrics["hardest"]) == float(shares.max())


def test_the_gradient_is_that_of_the_risks_weighed_by_constant_shares() -> None:
    """By plain torch in float64, each domain normalised by its own batch."""
    ours = build("group-dro", Sgd())
    state, given, twin = ours.init(), batch(ours), model().double().train()
    risks = torch.stack([F.cross_entropy(twin(x.double()), y) for x, y in zip(given.x, given.y, strict=True)])
    shares = torch.softmax(0.9 * risks.detach(), dim=0)
    slopes = torch.autograd.grad((shares * risks).sum(), tuple(twin.parameters()))
    after, _ = step(ours, state, given, 1, eta=0.9, lr=1.0)
    for (name, before), slope in zip(state.params.items(), slopes, strict=True):
        torch.testing.assert_close((before - after.params[name]).double(), slope, rtol=1e-3, atol=1e-5)


def test_shares_follow_the_recurrence_of_the_paper() -> None:
    ours = build("group-dro", Sgd())
    state, given = ours.init(), batch(ours)
    shares = torch.ones(DOMAINS, dtype=torch.float64)
    for _ in range(3):  # a learning rate of 0 keeps the risks as they are; running statistics do not matter
        state, _ = step(ours, state, given, 1, eta=0.5, lr=0.0)
        shares = shares * torch.exp(0.5 * _risks(given).double())
        shares = shares / shares.sum()
    torch.testing.assert_close(_shares(state).double(), shares, rtol=1e-4, atol=1e-6)


def test_a_share_that_vanished_comes_back() -> None:
    """In float32 a q that reached 0 would stay there; its logarithm does not."""
    ours = build("group-dro", Sgd())
    state, given = ours.init(), batch(ours)
    lost = torch.tensor([0.0, -200.0, -200.0])
    state = state._replace(buffers={**state.buffers, LOG_SHARES: lost})
    assert float(_shares(state)[1]) == 0.0
    after, _ = step(ours, state, given, 1, eta=1e4)
    assert int(_shares(after).argmax()) == int(_risks(given).argmax())


def test_permuted_domains_have_permuted_shares_and_the_same_loss() -> None:
    ours = build("group-dro", Sgd())
    given, order = batch(ours), torch.tensor([2, 0, 1])
    state = ours.init()
    uneven = torch.tensor([0.5, 0.3, 0.2]).log()
    first = step(ours, state._replace(buffers={**state.buffers, LOG_SHARES: uneven}), given, 1)
    turned = Batch(given.x[order], given.y[order])
    second = step(ours, state._replace(buffers={**state.buffers, LOG_SHARES: uneven[order]}), turned, 1)
    torch.testing.assert_close(first[1], second[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(_shares(first[0])[order], _shares(second[0]), rtol=1e-5, atol=1e-6)


def test_shares_survive_a_checkpoint(tmp_path: Path) -> None:
    """P12: a run that is resumed goes on with the shares it had."""
    ours = build("group-dro", Sgd())
    given = batch(ours)
    state, _ = step(ours, ours.init(), given, 1, eta=1.0)
    kept = Checkpoint("print", 1, state, (), ours.inference(state), 0.0)
    save_checkpoint(tmp_path / "checkpoint", kept)
    again = load_checkpoint(tmp_path / "checkpoint", torch.device("cpu")).state
    assert not torch.equal(_shares(again), _shares(ours.init()))
    straight, resumed = (step(ours, s, given, 2, eta=1.0) for s in (state, again))
    torch.testing.assert_close(tuple(straight[0]), tuple(resumed[0]), rtol=0.0, atol=0.0)
