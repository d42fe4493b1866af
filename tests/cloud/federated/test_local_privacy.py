"""Local privacy: devices clip and noise, the plan says so, and a device turns a weaker plan down."""

import math
from dataclasses import replace

import numpy as np
import pytest
from oracles.compiled import compiled_plan
from oracles.small_federation import model, splits
from wearfleet_cloud.cli.simulate import device_engine
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.privacy.central import check_plan
from wearfleet_cloud.federated.simulate import Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import StackedClients
from wearfleet_cloud.federated.wire_clients import WireClients
from wearfleet_edge.policy import PlanDemands, require_demands
from wearfleet_protos.errors import ConfigError, DeniedError
from wearfleet_protos.privacy import gaussian_epsilon, joint_norm

SIZES = {"anna": (45, 21), "ben": (20, 30)}
CLIENTS = tuple(
    SimulatedClient(name, parts["train"], parts["holdout"])
    for name, parts in ((n, splits(i, *SIZES[n])) for i, n in enumerate(SIZES))
)
START = model("cnn-plain")
TENSORS = {n: t.detach().numpy().copy() for n, t in START.state_dict().items()}


def made(**options: object):
    return create_strategy("fedavg", {"batch_size": 16, "learning_rate": 0.05, "dp": "local", **options})


def stacked(strategy) -> StackedClients:
    return StackedClients(strategy, START, 7)


def wired(strategy) -> WireClients:
    return WireClients(*compiled_plan(strategy, START, seed=7), device_engine)


@pytest.mark.parametrize("runner", [stacked, wired])
def test_what_a_client_sends_is_clipped_and_noised(runner) -> None:
    silent = runner(made(noise_multiplier=0.0, clip=0.01)).run(1, CLIENTS, [TENSORS] * 2, {})
    for sent in silent:
        assert 0.01 * (1.0 - 2.0**-21) <= joint_norm(sent.update) <= 0.01
    noisy = runner(made(noise_multiplier=1.5, clip=0.01)).run(1, CLIENTS, [TENSORS] * 2, {})
    for bare, sent in zip(silent, noisy, strict=True):
        noise = np.concatenate([(sent.update[n] - a).reshape(-1) for n, a in bare.update.items()])
        # sigma is z times the 2 C that a replaced update changes; standard error sigma / sqrt(2 n), five of them
        assert abs(noise.std() / (1.5 * 2.0 * 0.01) - 1.0) < 5.0 / math.sqrt(2 * noise.size)
    assert not np.array_equal(noisy[0].update["head.weight"], noisy[1].update["head.weight"])


def test_a_clip_that_binds_nobody_and_no_noise_is_the_uniform_federation_to_the_bit() -> None:
    def run(strategy):
        return simulate(strategy, START, Population(CLIENTS), Simulation(2, seed=7), stacked).tensors

    plain = create_strategy("fedavg", {"batch_size": 16, "learning_rate": 0.05, "weighting": "uniform"})
    expected, found = run(plain), run(made(noise_multiplier=0.0, clip=1e9))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_devices_draw_noise_that_differs_every_time() -> None:
    one, two = (wired(made(clip=0.1)).run(1, CLIENTS, [TENSORS] * 2, {})[0].update for _ in range(2))
    assert not np.array_equal(one["head.weight"], two["head.weight"])


@pytest.mark.parametrize("options", [{"clip": "inf"}, {"adaptive_clip": "on"}])
def test_local_privacy_needs_a_fixed_clip(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="fixed, finite clip"):
        made(**options)


def test_statistics_of_normalisation_are_refused() -> None:
    with pytest.raises(ConfigError, match="fedbn"):
        compiled_plan(made(), model("cnn"))


def test_a_run_is_refused_whose_plan_has_other_noise_than_its_options() -> None:
    """The ledger would count on noise that no device adds."""
    bare, _ = compiled_plan(create_strategy("fedavg", {}), START)
    noisy, _ = compiled_plan(made(clip=0.5), START)
    check_plan(made(clip=0.5), noisy)
    check_plan(create_strategy("fedavg", {}), bare)
    for strategy, plan in (
        (made(clip=0.5), bare),
        (made(clip=0.4), noisy),
        (create_strategy("fedavg", {}), noisy),
    ):
        with pytest.raises(ConfigError, match="same --set"):
            check_plan(strategy, plan)


def test_a_device_turns_a_plan_down_that_is_weaker_than_it_allows() -> None:
    plan, _ = compiled_plan(made(noise_multiplier=1.0, clip=0.5), START)
    assert (plan.upload.clip, plan.upload.noise) == (0.5, 1.0)
    given = gaussian_epsilon(1.0, 1e-5)
    require_demands(PlanDemands(given * 1.001), plan, uploads=True)
    with pytest.raises(DeniedError, match=r"epsilon 4\.38 .*allows 4\.3"):
        require_demands(PlanDemands(4.3), plan, uploads=True)
    weaker = replace(plan, upload=replace(plan.upload, noise=0.9))
    with pytest.raises(DeniedError):
        require_demands(PlanDemands(given), weaker, uploads=True)
    bare = replace(plan, upload=replace(plan.upload, clip=0.0, noise=0.0))
    with pytest.raises(DeniedError, match="epsilon inf"):
        require_demands(PlanDemands(1e6), bare, uploads=True)
    require_demands(PlanDemands(1e-3), bare, uploads=False)  # what is personal stays on the device
    require_demands(PlanDemands(), bare, uploads=True)


def test_a_device_takes_part_in_the_strategies_that_it_names() -> None:
    plan, _ = compiled_plan(made(), START)
    require_demands(PlanDemands(strategies=frozenset({"fedavg", "fedbn"})), plan, uploads=True)
    with pytest.raises(DeniedError, match=r"fedavg is not among.*fedbn"):
        require_demands(PlanDemands(strategies=frozenset({"fedbn"})), plan, uploads=False)
