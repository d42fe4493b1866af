"""MLDG: its step written out by hand in both modes, and the statistics that strict mode leaves untouched."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import DOMAINS, batch, build, data, step
from torch import Tensor
from torch.func import functional_call
from wearfleet_cloud.algorithms import Algorithm, Batch, State
from wearfleet_cloud.training.optimisers import Adam, Sgd

_BETA, _INNER = 0.7, 0.05


def _gradient(algorithm: Algorithm, params: dict[str, Tensor], state: State, x: Tensor, y: Tensor) -> tuple:
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    loss = F.cross_entropy(functional_call(algorithm.model, {**leaves, **state.buffers}, (x,)), y)
    return loss.detach(), torch.autograd.grad(loss, list(leaves.values()))


def _by_hand(algorithm: Algorithm, state: State, given: Batch, order: tuple[int, ...], trial) -> tuple:
    """Objective and direction of one step: loops over the pairs of a circle."""
    total, objective = [torch.zeros_like(p) for p in state.params.values()], torch.zeros(())
    for first, second in pairwise((*order, order[0])):
        loss, here = _gradient(algorithm, state.params, state, given.x[first], given.y[first])
        moved = trial(state.params, here)
        after, there = _gradient(algorithm, moved, state, given.x[second], given.y[second])
        total = [t + (h + _BETA * g) / DOMAINS for t, h, g in zip(total, here, there, strict=True)]
        objective = objective + (loss + _BETA * after) / DOMAINS
    return objective, dict(zip(state.params, total, strict=True))


def _trial_sgd(params: dict[str, Tensor], grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {n: p - _INNER * g for (n, p), g in zip(params.items(), grads, strict=True)}


def _trial_adam(params: dict[str, Tensor], grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    optimiser = torch.optim.Adam(leaves.values(), _INNER, (0.5, 0.9), weight_decay=5e-4)
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        leaf.grad = grad
    optimiser.step()
    return {n: leaf.detach() for n, leaf in leaves.items()}


@pytest.mark.parametrize("mode", ["corrected", "strict"])
def test_a_step_is_that_of_the_definition(mode: str) -> None:
    optimiser = Adam(betas=(0.5, 0.9), weight_decay=5e-4)
    mldg = build("mldg", optimiser, {"mode": mode})
    mldg.model.double()
    state, given = mldg.init(), batch(mldg)
    given = given._replace(x=given.x.double())
    after, metrics = step(mldg, state, given, 4, beta=_BETA, inner_lr=_INNER, lr=0.01)
    trial = _trial_sgd if mode == "corrected" else _trial_adam
    by_order = [_by_hand(mldg, state, given, order, trial) for order in permutations(range(DOMAINS))]
    objective, direction = min(by_order, key=lambda found: abs(float(found[0] - metrics["loss"])))
    # The float32 hyper-parameters differ from ours by up to 6e-8 of themselves.
    torch.testing.assert_close(metrics["loss"], objective, rtol=1e-6, atol=0.0, check_dtype=False)
    expected, _ = optimiser.update(state.params, direction, state.slots, torch.tensor(0.01))
    torch.testing.assert_close(after.params, expected, rtol=1e-5, atol=1e-6)


def test_without_the_second_term_it_is_domain_averaged_erm_with_frozen_norms() -> None:
    mldg, erm = build("mldg", Sgd()), build("erm", Sgd())
    mldg.model.eval(), erm.model.eval()
    state, given = erm.init(), batch(erm)
    expected, plain = step(erm, state, given, 1)
    ours, metrics = step(mldg, state, given, 1, beta=0.0)
    torch.testing.assert_close(tuple(ours), tuple(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["loss"], plain["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_evaluation_agrees_with_training_unless_strict() -> None:
    """T11. Strict steps never move the running statistics, so that the network that is kept is another one.

    The windows are far from mean 0 and variance 1, and alike in all domains: each has the statistics of all.
    """
    source = data(240, domains=1)
    x, y = 4.0 * source.windows(slice(None)) + 10.0, source.y
    right = {}
    for mode in ("corrected", "strict"):
        mldg = build("mldg", Adam(), {"mode": mode})
        state = mldg.init()
        for number in range(60):
            drawn = torch.randint(0, 240, (3, 20), generator=torch.Generator().manual_seed(number))
            state, _ = step(mldg, state, Batch(x[drawn], y[drawn]), number, lr=0.003)
        for training in (True, False):
            mldg.model.train(training)
            tensors = {n: t.clone() for n, t in mldg.inference(state).items()}
            logits = functional_call(mldg.model, tensors, (x,))
            right[mode, training] = float((logits.argmax(1) == y).float().mean())
    assert right["corrected", True] > 0.9
    assert abs(right["corrected", True] - right["corrected", False]) < 0.02
    assert right["strict", True] - right["strict", False] > 0.2


def test_strict_steps_leave_the_running_statistics() -> None:
    for mode, still in (("corrected", False), ("strict", True)):
        mldg = build("mldg", Sgd(), {"mode": mode})
        state, given = mldg.init(), batch(mldg)
        after, _ = step(mldg, state, given)
        assert (
            torch.equal(
                after.buffers["backbone.norm1.running_mean"], state.buffers["backbone.norm1.running_mean"]
            )
            is still
        )
