"""Fishr: what it is before its penalty begins, its gradient by double differentiation, and its moving average."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import CLASSES, DOMAINS, batch, build, model, step
from torch import Tensor
from torch.func import grad, vmap
from wearfleet_cloud.algorithms.base import Batch
from wearfleet_cloud.algorithms.fishr import AVERAGE, Fishr
from wearfleet_cloud.training.optimisers import Adam, Sgd
from wearfleet_models import Classifier
from wearfleet_protos.errors import ConfigError

MODES = ["corrected", "strict"]
EMA, LAM = 0.8, 30.0


@pytest.mark.parametrize("mode", MODES)
def test_fishr_before_its_penalty_begins_is_erm(mode: str) -> None:
    fishr, erm = build("fishr", Sgd(), {"mode": mode}), build("erm", Sgd())
    given = batch(erm)
    expected, plain = step(erm, erm.init(), given, 1)
    ours, metrics = step(fishr, fishr.init(), given, 1)
    torch.testing.assert_close(fishr.inference(ours), erm.inference(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["loss"], plain["loss"], rtol=1e-5, atol=1e-6)
    assert float(metrics["penalty"]) > 0.0


def _variances(network: Classifier, given: Batch) -> tuple[Tensor, Tensor]:
    """Risk, and variances (D, K, F + 1), from the gradient of every window, differentiable through it."""
    features = network.features(given.x.flatten(0, 1))

    def one(weight: Tensor, bias: Tensor, feature: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(feature @ weight.T + bias, y)

    slopes = vmap(grad(one, (0, 1)), (None, None, 0, 0))(
        network.head.weight, network.head.bias, features, given.y.flatten()
    )
    windows = torch.cat([slopes[0], slopes[1][:, :, None]], dim=2).reshape(
        DOMAINS, -1, CLASSES, features.shape[1] + 1
    )
    return F.cross_entropy(network.head(features), given.y.flatten()), windows.var(dim=1, correction=0)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_that_of_gradients_of_every_window(mode: str) -> None:
    """Three steps of the algorithm as printed, in float64, differentiated twice by autograd."""
    fishr, twin = build("fishr", Sgd(), {"mode": mode}), model().double()
    state, average = fishr.init(), torch.zeros(())
    for number in range(3):
        given = batch(fishr, seed=number)
        risk, variances = _variances(twin, given._replace(x=given.x.double()))
        average = EMA * average.detach() + (1.0 - EMA) * variances
        used = average / (1.0 - EMA ** (number + 1 if mode == "corrected" else 1))
        penalty = torch.stack([(used[d] - used.mean(0)).square().mean() for d in range(DOMAINS)]).mean()
        slopes = torch.autograd.grad(risk + LAM * penalty, tuple(twin.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(twin.parameters(), slopes, strict=True):
                parameter.sub_(0.05 * slope)
        state, metrics = step(fishr, state, given, number, lam=LAM, anneal_steps=0.0, ema=EMA)
        torch.testing.assert_close(metrics["penalty"].double(), penalty.detach(), rtol=1e-4, atol=1e-8)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(state.params[name].double(), parameter.detach(), rtol=1e-3, atol=1e-5)


def test_the_average_of_equal_batches_fills_up_by_the_power_of_its_decay() -> None:
    """T7: a learning rate of 0 keeps the variances v as they are, and strict mode uses v (1 - ema^t) / (1 - ema)."""
    penalties: dict[str, list[float]] = {mode: [] for mode in MODES}
    for mode in MODES:
        fishr = build("fishr", Sgd(), {"mode": mode})
        state, given = fishr.init(), batch(fishr)
        averages = []
        for number in range(4):
            state, metrics = step(fishr, state, given, number, lr=0.0, ema=EMA)
            penalties[mode].append(float(metrics["penalty"]))
            averages.append(state.buffers[AVERAGE])
        for number, average in enumerate(averages):
            expected = averages[0] / (1.0 - EMA) * (1.0 - EMA ** (number + 1))
            torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-9)
    first = penalties["corrected"][0]
    assert penalties["corrected"] == pytest.approx([first] * 4, rel=1e-4)
    grown = [first * ((1.0 - EMA**t) / (1.0 - EMA)) ** 2 for t in range(1, 5)]
    assert penalties["strict"] == pytest.approx(grown, rel=1e-4)  # P14


def test_the_penalty_begins_late_and_the_optimiser_anew_with_it() -> None:
    fishr = build("fishr", Adam())
    state, given = fishr.init(), batch(fishr)
    weights, counts = [], []
    for number in range(4):
        state, metrics = step(fishr, state, given, number, lam=LAM, anneal_steps=2.0)
        weights.append(float((metrics["loss"] - metrics["risk"]) / metrics["penalty"]))
        counts.append(float(state.slots["adam_step"]))
    assert weights == pytest.approx([0.0, 0.0, LAM, LAM], rel=1e-2)
    assert counts == [1.0, 2.0, 1.0, 2.0]


def test_equal_domains_cost_nothing() -> None:
    fishr = build("fishr", Sgd())
    given = batch(fishr)
    equal = Batch(given.x[:1].expand(3, -1, -1, -1), given.y[:1].expand(3, -1))
    assert (
        float(step(fishr, fishr.init(), equal, 1)[1]["penalty"]) < 1e-12
    )  # (rounding of entries of about 1)^2


def test_a_mode_that_does_not_exist_is_named() -> None:
    erm = build("erm", Sgd())
    with pytest.raises(ConfigError, match="corrected or strict"):
        Fishr(erm.model, erm.optimiser, DOMAINS, "loose")
