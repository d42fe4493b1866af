"""LAG: its network, its two penalties by their definition, and the defect that strict mode keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import CLASSES, DOMAINS, batch, build, model, step
from torch import Tensor
from wearfleet_cloud.algorithms import network_of
from wearfleet_cloud.algorithms.base import Batch
from wearfleet_cloud.algorithms.lag import Lag
from wearfleet_cloud.kernels.coral import coral_penalty_reference
from wearfleet_cloud.training.optimisers import Adam, Sgd
from wearfleet_models import ModelSpec, build_classifier
from wearfleet_protos.errors import ConfigError

NECKS = ("backbone.whole_neck.", "backbone.local_neck.")


@pytest.mark.parametrize("backbone", ["cnn", "transformer"])
def test_the_network_has_two_views_of_256_numbers(backbone: str) -> None:
    network = model("lag", backbone=backbone)
    assert network.spec.backbone == f"lag-{backbone}"
    assert network.head.weight.shape == (CLASSES, 512)
    again = network_of("lag", network.spec, DOMAINS)
    assert again.backbone == f"lag-{backbone}"


def test_a_backbone_without_two_views_is_named() -> None:
    with pytest.raises(ConfigError, match="cnn and transformer only, got 'resnet'"):
        network_of("lag", ModelSpec("resnet", 3, 40, CLASSES), DOMAINS)


def test_lag_without_penalties_is_domain_averaged_erm_on_its_network_with_frozen_norms() -> None:
    lag = build("lag", Sgd())
    lag.model.eval()
    state, given = lag.init(), batch(lag)
    twin = build_classifier(lag.model.spec, 0).double().eval()
    risks = torch.stack([F.cross_entropy(twin(x.double()), y) for x, y in zip(given.x, given.y, strict=True)])
    slopes = torch.autograd.grad(risks.mean(), tuple(twin.parameters()))
    after, metrics = step(lag, state, given, 1, gamma=0.0, local_gamma=0.0, lr=1.0)
    torch.testing.assert_close(metrics["loss"].double(), risks.mean().detach(), rtol=1e-5, atol=1e-6)
    for (name, before), slope in zip(state.params.items(), slopes, strict=True):
        torch.testing.assert_close((before - after.params[name]).double(), slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["corrected", "strict"])
def test_loss_and_gradient_are_those_of_the_definition(mode: str) -> None:
    """Risks and both penalties written out, in float64, by plain autograd."""
    lag = build("lag", Sgd(), {"mode": mode})
    state, given = lag.init(), batch(lag)
    twin = build_classifier(lag.model.spec, 0).double().train()
    views = [twin.features(x.double()) for x in given.x]
    risk = torch.stack([F.cross_entropy(twin.head(v), y) for v, y in zip(views, given.y, strict=True)]).mean()
    whole, local = (torch.stack([v[:, part] for v in views]) for part in (slice(256), slice(256, 512)))
    loss = risk + 2.0 * coral_penalty_reference(whole) + 3.0 * coral_penalty_reference(local)
    slopes = torch.autograd.grad(loss, tuple(twin.parameters()))
    after, metrics = step(lag, state, given, 1, gamma=2.0, local_gamma=3.0, lr=1.0)
    torch.testing.assert_close(metrics["loss"].double(), loss.detach(), rtol=1e-5, atol=1e-6)
    for (name, before), slope in zip(state.params.items(), slopes, strict=True):
        fixed = mode == "strict" and name.startswith(NECKS)
        expected = torch.zeros_like(slope) if fixed else slope
        torch.testing.assert_close((before - after.params[name]).double(), expected, rtol=2e-3, atol=2e-5)


def test_strict_mode_never_trains_what_ends_the_views() -> None:
    """P2: nor does weight decay touch them, but their running statistics move."""
    lag = build("lag", Adam(weight_decay=0.1), {"mode": "strict"})
    state, given = lag.init(), batch(lag)
    after, _ = step(lag, state, given, 1)
    still = {n for n, p in state.params.items() if torch.equal(p, after.params[n])}
    assert still == {n for n in state.params if n.startswith(NECKS)}
    assert not torch.equal(*(s.buffers["backbone.local_neck.norm.running_mean"] for s in (state, after)))


def test_equal_domains_cost_nothing() -> None:
    lag = build("lag", Sgd())
    given = batch(lag)
    equal = Batch(given.x[:1].expand(3, -1, -1, -1), given.y[:1].expand(3, -1))
    _, metrics = step(lag, lag.init(), equal, 1)
    # Entries of about 1: their rounding, but for the Gram form's difference of sums, a mean of F^2 entries.
    assert abs(float(metrics["penalty"])) < 1e-6


@pytest.mark.slow
def test_each_weight_makes_its_view_of_the_domains_more_alike() -> None:
    final: dict[tuple[float, float], Tensor] = {}
    for weights in ((0.0, 0.0), (10.0, 0.0), (0.0, 10.0)):
        lag = build("lag", Adam())
        state, given = lag.init(), batch(lag, windows=16)
        for number in range(40):
            state, _ = step(lag, state, given, number, gamma=weights[0], local_gamma=weights[1], lr=0.003)
        measured = [
            step(lag, state, given, 1, gamma=g, local_gamma=1.0 - g)[1]["penalty"] for g in (1.0, 0.0)
        ]
        final[weights] = torch.stack(measured)
    whole, local = final[10.0, 0.0] / final[0.0, 0.0], final[0.0, 10.0] / final[0.0, 0.0]
    assert float(whole[0]) < 0.5
    assert float(local[1]) < 0.5


def test_a_mode_that_does_not_exist_is_named() -> None:
    lag = build("lag", Sgd())
    with pytest.raises(ConfigError, match="corrected or strict"):
        Lag(lag.model, lag.optimiser, DOMAINS, "loose")
