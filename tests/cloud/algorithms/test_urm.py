"""URM: without its critic, beside two optimisers of torch, and that the critic's task becomes harder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import batch, build, model, step
from torch import nn
from wearfleet_cloud.algorithms import build_algorithm
from wearfleet_cloud.algorithms.urm import noise
from wearfleet_cloud.training.optimisers import Adam, Sgd


def test_without_the_critic_it_is_erm_on_the_same_network() -> None:
    urm = build("urm", Sgd(momentum=0.9))
    erm = build_algorithm("erm", model("urm"), Sgd(momentum=0.9), domains=3)
    state, plain, given = urm.init(), erm.init(), batch(urm)
    for _ in range(2):
        state, metrics = step(urm, state, given, 1, gamma=0.0)
        plain, expected = step(erm, plain, given, 1)
    torch.testing.assert_close(urm.inference(state), erm.inference(plain), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(metrics["loss"], expected["loss"], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("output", ["tanh", "relu", "sigmoid"])
def test_steps_are_those_of_two_optimisers_of_torch(output: str) -> None:
    urm = build("urm", Adam(weight_decay=5e-4), {"output": output})
    urm.model.double()
    state, given = urm.init(3), batch(urm)
    state = state._replace(params={n: p.double() for n, p in state.params.items()})
    given = given._replace(x=given.x.double())
    network = model("urm", {"output": output}).double()
    width = network.head.in_features
    critic = nn.Sequential(
        nn.Linear(width, 100), nn.LeakyReLU(), nn.Linear(100, 100), nn.LeakyReLU(),
        nn.Linear(100, 100), nn.LeakyReLU(), nn.Linear(100, 1),
    ).double()  # fmt: skip
    critic.load_state_dict(
        {n.removeprefix("critic/"): p for n, p in state.params.items() if n.startswith("critic/")}
    )
    first = torch.optim.Adam(network.parameters(), 0.01, weight_decay=5e-4)
    second = torch.optim.Adam(critic.parameters(), 0.01, weight_decay=5e-4)
    entropy = F.binary_cross_entropy_with_logits
    one, zero = torch.ones(18, 1).double(), torch.zeros(18, 1).double()
    for number in range(3):
        state, metrics = step(urm, state, given, number, lr=0.01, gamma=0.25)
        z = network.features(given.x.flatten(0, 1))
        loss = F.cross_entropy(network.head(z), given.y.flatten()) + 0.25 * entropy(critic(z), one)
        first.zero_grad()
        loss.backward()
        first.step()
        n = noise(output, torch.tensor(number), z)
        told = entropy(critic(n), one) + 0.25 * entropy(critic(z.detach()), zero)
        second.zero_grad()
        told.backward()
        second.step()
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(metrics["critic"], told.detach(), rtol=1e-6, atol=1e-7)
    # lr is a float32 tensor: 0.01 is off by up to 6e-8 of itself.
    torch.testing.assert_close(urm.inference(state), dict(network.state_dict()), rtol=1e-6, atol=1e-6)
    ours = {n.removeprefix("critic/"): p for n, p in state.params.items() if n.startswith("critic/")}
    torch.testing.assert_close(ours, dict(critic.state_dict()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("output", "low", "high"), [("tanh", -1.0, 1.0), ("relu", 0.0, 1.0), ("sigmoid", 0.0, 1.0)]
)
def test_noise_is_uniform_over_the_range_of_the_activation(output: str, low: float, high: float) -> None:
    drawn = noise(output, torch.tensor(5), torch.zeros(200, 50)).flatten().sort().values
    assert low <= drawn[0] < drawn[-1] < high
    level = torch.linspace(low, high, len(drawn))
    assert float((drawn - level).abs().max()) < 1.95 / len(drawn) ** 0.5 * (high - low)  # Kolmogorov, 0.1 %


@pytest.mark.slow
@pytest.mark.parametrize(("output", "backbone", "low"), [("relu", "cnn", 0.0), ("tanh", "transformer", -1.0)])
def test_features_become_more_uniform(output: str, backbone: str, low: float) -> None:
    distance = {}
    for gamma in (0.0, 1.0):
        urm = build("urm", Adam(), {"output": output}, backbone=backbone)
        state, given = urm.init(), batch(urm, windows=16)
        for number in range(100):
            state, _ = step(urm, state, given, number, lr=0.003, gamma=gamma)
        urm.model.load_state_dict(urm.inference(state))
        with torch.no_grad():
            z = urm.model.features(given.x.flatten(0, 1)).flatten().sort().values
        distance[gamma] = float((z - torch.linspace(low, 1.0, len(z))).abs().mean())
    assert distance[1.0] < 0.7 * distance[0.0], distance


def test_smoothed_targets_cost_a_sure_critic_half_the_smoothing_times_its_logits() -> None:
    """BCE is linear in the target: the mean target of noise falls by s / 2, that of features rises by s / 2."""
    urm = build("urm", Sgd(), {"output": "sigmoid"})
    state, given = urm.init(), batch(urm, windows=64)
    state.params["critic/6.weight"].zero_()
    state.params["critic/6.bias"].fill_(3.0)  # every logit is 3
    hard, soft = (float(step(urm, state, given, 1, smoothing=s)[1]["critic"]) for s in (0.0, 0.4))
    # 0.2 * 3 (1 - gamma), gamma = 0.1; the mean of 192 uniform numbers has a deviation of 0.021.
    assert soft - hard == pytest.approx(0.2 * 3.0 * 0.9, abs=4 * 0.021 * 0.4 * 3.0)


def test_strict_mode_forgets_the_activation_on_transformers() -> None:
    for backbone, mode, neck in (
        ("transformer", "corrected", "tanh"), ("transformer", "strict", "none"), ("cnn", "strict", "tanh"),
    ):  # fmt: skip
        assert model("urm", {"mode": mode}, backbone=backbone).spec.neck == neck
    assert model("urm", {"output": "sigmoid"}).spec.neck == "sigmoid"
