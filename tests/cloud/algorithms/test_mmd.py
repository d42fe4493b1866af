"""MMD: what it is without its penalty, the penalty's range and zero, and that it does what it is for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import DOMAINS, batch, build, model, step
from wearfleet_cloud.algorithms.base import Batch, State
from wearfleet_cloud.algorithms.mmd import Mmd
from wearfleet_cloud.kernels.mmd import FIXED_GAMMAS, median_gammas, mmd, mmd_reference
from wearfleet_cloud.training.optimisers import Adam, Sgd
from wearfleet_protos.errors import ConfigError

BANDWIDTHS = ["fixed", "median"]


def _mmd(bandwidths: str) -> Mmd:
    algorithm = build("mmd", Adam(), {"bandwidths": bandwidths})
    assert isinstance(algorithm, Mmd)
    return algorithm


def _double(state: State) -> State:
    """The same in float64."""
    return State(*({n: t.double() if t.is_floating_point() else t for n, t in p.items()} for p in state))


@pytest.mark.parametrize("bandwidths", BANDWIDTHS)
def test_mmd_without_penalty_is_domain_averaged_erm_with_frozen_norms(bandwidths: str) -> None:
    ours, erm = build("mmd", Sgd(), {"bandwidths": bandwidths}), build("erm", Sgd())
    ours.model.eval(), erm.model.eval()
    state, given = erm.init(), batch(erm)
    expected, plain = step(erm, state, given, 1)
    after, metrics = step(ours, state, given, 1, gamma=0.0)
    torch.testing.assert_close(tuple(after), tuple(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["risk"], plain["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bandwidths", BANDWIDTHS)
def test_loss_and_gradient_are_those_of_the_definition(bandwidths: str) -> None:
    """Every domain normalised by its own batch, in float64, by plain autograd."""
    ours = build("mmd", Sgd(), {"bandwidths": bandwidths})
    state, given, twin = _double(ours.init()), batch(ours), model().double().train()
    features = torch.stack([twin.features(x.double()) for x in given.x])
    fixed = torch.tensor(FIXED_GAMMAS, dtype=torch.float64)
    gammas = fixed if bandwidths == "fixed" else median_gammas(features)
    penalty = mmd_reference(features, gammas)
    loss = F.cross_entropy(twin.head(features).flatten(0, 1), given.y.flatten()) + 2.0 * penalty
    slopes = torch.autograd.grad(loss, tuple(twin.parameters()))
    # In float64 too: windows drawn twice are apart by rounding, which a bandwidth of 1000 magnifies. The value errs as
    # in the next test, by 1e-6; a slope, relatively, by 1000 times the error of a distance there, again 1e-6.
    after, metrics = step(ours, state, given._replace(x=given.x.double()), 1, gamma=2.0, lr=1.0)
    torch.testing.assert_close(metrics["penalty"], penalty.detach(), rtol=0.0, atol=1e-6)
    for (name, before), slope in zip(state.params.items(), slopes, strict=True):
        torch.testing.assert_close(before - after.params[name], slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bandwidths", BANDWIDTHS)
def test_equal_domains_cost_nothing(bandwidths: str) -> None:
    ours = _mmd(bandwidths)
    given = batch(ours)
    equal = Batch(given.x[:1].expand(3, -1, -1, -1).double(), given.y[:1].expand(3, -1))
    _, metrics = step(ours, _double(ours.init()), equal, 1)
    # Distances of equal windows, 256 features of squared norm below 4 each, err by 260 * 2^-52 * 4 * 1024, the
    # kernels by at most the sum of the bandwidths, 1111, times that.
    assert abs(float(metrics["penalty"])) <= 4.0 * 1111.0 * 260 * 2**-52 * 4 * 1024


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 100.0])
def test_the_penalty_lies_between_0_and_two_for_each_kernel(scale: float) -> None:
    """T5: a biased estimate is a squared norm, and a kernel is at most 1."""
    gammas = torch.tensor(FIXED_GAMMAS, dtype=torch.float64)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        features = scale * torch.randn(3, 5, 7, dtype=torch.float64, generator=generator)
        features = features + torch.randn(3, 1, 7, dtype=torch.float64, generator=generator)
        for value in (mmd(features, gammas), mmd_reference(features, gammas)):
            assert -1e-14 <= float(value) <= 2.0 * len(FIXED_GAMMAS)
    apart = torch.tensor([0.0, 1e6], dtype=torch.float64)[:, None, None].expand(2, 4, 1)
    assert float(mmd(apart, gammas)) == 2.0 * len(FIXED_GAMMAS)  # the bound is reached


def test_only_the_two_smallest_fixed_bandwidths_have_a_slope_on_wide_features() -> None:
    """P13, why there is a choice: windows 30 apart, as standardised features of a thousand dimensions are."""
    far = 30.0 * torch.eye(12, dtype=torch.float64).reshape(2, 6, 12) / 2**0.5  # all pairs 30 apart
    slopes = []
    for gamma in FIXED_GAMMAS:
        leaf = far.clone().requires_grad_()
        (slope,) = torch.autograd.grad(
            mmd(leaf, torch.tensor([gamma], dtype=torch.float64)) + 0.0 * leaf.sum(), leaf
        )
        slopes.append(float(slope.abs().max()))
    assert max(slopes[2:]) < 1e-30
    assert 1e-6 < slopes[1] < slopes[0]


def test_padding_has_no_say_in_the_bandwidths() -> None:
    ours = _mmd("median")
    short = batch(ours, windows=4)
    padded = Batch(
        torch.cat([short.x, torch.full((3, 2, 3, 40), 9.0)], 1),
        torch.cat([short.y, torch.zeros(3, 2, dtype=torch.int64)], 1),
        torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]).expand(3, 6),
    )
    one, other = (step(ours, ours.init(), given, 1)[1]["penalty"] for given in (padded, short))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bandwidths", BANDWIDTHS)
def test_mmd_makes_the_domains_more_alike(bandwidths: str) -> None:
    final = {}
    for gamma in (0.0, 10.0):
        ours = _mmd(bandwidths)
        state, given = ours.init(), batch(ours, windows=16)
        for number in range(60):
            state, metrics = step(ours, state, given, number, gamma=gamma, lr=0.003)
        final[gamma] = float(metrics["penalty"])
    assert final[10.0] < 0.8 * final[0.0]


def test_bandwidths_that_do_not_exist_are_named() -> None:
    erm = build("erm", Sgd())
    with pytest.raises(ConfigError, match="fixed or median"):
        Mmd(erm.model, erm.optimiser, DOMAINS, "mean")
