"""Fish: what it is for one domain, against its steps written out, and what the running statistics become."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import batch, build, model, step
from torch.func import functional_call
from wearfleet_cloud.algorithms import Batch
from wearfleet_cloud.training.optimisers import Adam, Sgd


def test_one_domain_and_the_whole_way_is_one_step_of_erm() -> None:
    fish, erm = build("fish", Adam(), domains=1), build("erm", Adam(), domains=1)
    fish.model.double(), erm.model.double()
    state, given = fish.init(), batch(fish, domains=1)
    given = given._replace(x=given.x.double())
    ours, metrics = step(fish, state, given, epsilon=1.0)
    expected, plain = step(erm, state, given)
    torch.testing.assert_close(tuple(ours), tuple(expected), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(metrics, plain, rtol=1e-6, atol=0.0)


def test_strict_steps_are_those_of_the_published_code_with_torchs_adam() -> None:
    fish = build("fish", Adam(betas=(0.9, 0.999), weight_decay=5e-4), {"mode": "strict"})
    fish.model.double()
    state = fish.init()
    reference, inner = model().double(), model().double()
    optimiser = torch.optim.Adam(inner.parameters(), 0.01, (0.9, 0.999), weight_decay=5e-4)
    for number in range(3):
        given = batch(fish, seed=number)
        given = given._replace(x=given.x.double())
        state, _ = step(fish, state, given, lr=0.01, epsilon=0.3)
        inner.load_state_dict(reference.state_dict())
        for x, y in zip(given.x, given.y, strict=True):
            optimiser.zero_grad()
            F.cross_entropy(inner(x), y).backward()
            optimiser.step()
        with torch.no_grad():
            for ours, theirs in zip(
                reference.state_dict().values(), inner.state_dict().values(), strict=True
            ):
                ours.copy_(
                    ours + 0.3 * (theirs - ours)
                    if ours.is_floating_point()
                    else torch.round(ours + 0.3 * (theirs - ours))
                )
    kept = fish.inference(state)
    # lr and epsilon are float32 tensors: 0.3 and 0.01 are off by up to 6e-8 of themselves.
    torch.testing.assert_close(kept, dict(reference.state_dict()), rtol=1e-6, atol=1e-6)


def test_strict_statistics_lag_behind_and_corrected_ones_do_not() -> None:
    means = {}
    for mode in ("corrected", "strict"):
        fish = build("fish", Sgd(), {"mode": mode})
        state = fish.init()
        for number in range(20):
            state, _ = step(fish, state, batch(fish, seed=number), lr=0.0, epsilon=0.1)
        means[mode] = (
            state.buffers["backbone.norm1.running_mean"].norm()
            / _mean_of_first_layer(state, batch(fish, 24)).norm()
        )
    # 60 passes move them by 1 - 0.9^60 = 0.998 of the way, 20 tenths of three passes by 1 - (1 - 0.0271)^20 = 0.42.
    assert float(means["corrected"]) == pytest.approx(1.0, abs=0.1)
    assert float(means["strict"]) == pytest.approx(0.42, abs=0.1)


def test_corrected_mode_draws_the_order_of_the_domains() -> None:
    for mode, orders in (("corrected", {2, 3, 4, 5, 6}), ("strict", {1})):
        fish = build("fish", Sgd(), {"mode": mode})
        state, given = fish.init(), batch(fish)
        heads = [step(fish, state, given, key, epsilon=1.0)[0].params["head.bias"] for key in range(12)]
        assert len({tuple(round(v, 5) for v in head.tolist()) for head in heads}) in orders


def test_the_step_raises_the_product_of_the_domains_gradients() -> None:
    """Over both orders the second-order part of theta' - theta is lr^2 / 2 of the gradient of g_1 . g_2.

    From g_2(theta - lr g_1) = g_2 - lr H_2 g_1 + O(lr^2); the O(lr^3) that remains is below 1 % at lr = 1e-4.
    """
    fish = build("fish", Sgd(), {"mode": "strict"}, domains=2)
    fish.model.double().eval()
    state, given = fish.init(), batch(fish, domains=2)
    given, lr = given._replace(x=given.x.double()), 1e-4
    params = {n: p.clone().requires_grad_() for n, p in state.params.items()}
    both = [
        torch.autograd.grad(
            F.cross_entropy(functional_call(fish.model, {**params, **state.buffers}, (x,)), y),
            list(params.values()),
            create_graph=True,
        )
        for x, y in zip(given.x, given.y, strict=True)
    ]
    product = sum((one * two).sum() for one, two in zip(*both, strict=True))
    expected = torch.autograd.grad(product, list(params.values()))
    turned = Batch(given.x.flip(0), given.y.flip(0))
    rate = {"lr": torch.tensor(lr, dtype=torch.float64), "epsilon": torch.tensor(1.0, dtype=torch.float64)}
    moved = [fish.step(state, b, rate, torch.tensor(0))[0].params for b in (given, turned)]
    for name, one, two, law in zip(params, *both, expected, strict=True):
        second = (moved[0][name] + moved[1][name]) / 2.0 - state.params[name] + lr * (one + two)
        torch.testing.assert_close(
            second.detach() / (lr * lr / 2.0), law, rtol=1e-2, atol=1e-2 * float(law.abs().max())
        )


def _mean_of_first_layer(state, given: Batch) -> torch.Tensor:
    x = given.x.flatten(0, 1)
    return F.conv1d(x, state.params["backbone.conv1.weight"], state.params["backbone.conv1.bias"]).mean(
        (0, 2)
    )
