"""A simulated federation whose updates are summed under masks, by the device's and the service's own machines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cloud.federated.test_simulation import CLIENTS, SEED
from oracles.small_federation import model
from wearfleet_cloud.cli.simulate import device_member
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Contribution
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.privacy.secagg_fold import secure_contribution
from wearfleet_cloud.federated.privacy.secagg_server import SecureSum
from wearfleet_cloud.federated.simulate import Outcome, Population, Simulation, simulate
from wearfleet_cloud.federated.stacked_clients import StackedClients
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.plan import UploadSpec
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

STEP = 2.0 / 2**16
"""Of the quantiser, with the defaults: 2 c / q."""


def stacked(strategy: Strategy) -> StackedClients:
    return StackedClients(strategy, model("cnn"), SEED, at_once=3)


def outcome(name: str, *, rounds: int = 1, cohort: int = 0, **options: Any) -> Outcome:
    strategy = create_strategy(name, {"batch_size": 16, "learning_rate": 0.05, **options})
    simulation = Simulation(rounds, CohortPolicy(cohort), SEED)
    return simulate(
        strategy, model("cnn"), Population(CLIENTS), simulation, stacked, machine_of=device_member
    )


@pytest.mark.parametrize("name", ["fedavg", "fedbn", "scaffold", "fedadam"])
def test_the_new_model_is_the_plain_one_within_the_quantisers_step(name: str) -> None:
    """The means differ by less than a step (weights are exact: all have fewer than 1 000 windows); then rounding.

    Nothing is cut: no difference is beyond the clip of 4. FedAdam's first step is rate d (1 - beta1) / (sqrt(v) + tau)
    with rate 1e-2, tau at least 1e-3 and 1 - beta1 = 0.1: a slope of 1 at most, 20 with bias correction and room.
    """
    clip = 4.0
    shared = {"statistics": "naive", **({"server_learning_rate": 1e-2} if name == "fedadam" else {})}
    plain = outcome(name, **shared)
    secure = outcome(name, secagg="on", secagg_clip=clip, **shared)
    gain = 20.0 if name == "fedadam" else 1.0
    for tensor, array in plain.tensors.items():
        if np.issubdtype(array.dtype, np.integer):
            continue
        error = np.abs(secure.tensors[tensor].astype(np.float64) - array)
        assert (error <= gain * clip * STEP + 2e-7 * np.abs(array)).all(), tensor
    moved = [np.abs(plain.tensors[k] - v).max() for k, v in secure.tensors.items()]
    assert max(moved) > 0  # it did go through the quantiser


def test_the_mean_is_by_windows_or_of_equal_weights_as_the_run_says() -> None:
    by_windows = outcome("fedavg", secagg="on", statistics="naive")
    uniform = outcome("fedavg", secagg="on", statistics="naive", weighting="uniform")
    expected = outcome("fedavg", statistics="naive", weighting="uniform")
    differs = False
    for tensor, array in expected.tensors.items():
        if np.issubdtype(array.dtype, np.integer):
            continue
        assert np.abs(uniform.tensors[tensor].astype(np.float64) - array).max() <= STEP + 1e-6
        differs |= bool(np.abs(by_windows.tensors[tensor] - uniform.tensors[tensor]).max() > 4 * STEP)
    assert differs


def test_it_can_be_repeated() -> None:
    first, second = (outcome("fedavg", rounds=2, secagg="on") for _ in range(2))
    for tensor, array in first.tensors.items():
        np.testing.assert_array_equal(second.tensors[tensor], array)


def test_too_few_members_are_no_round_and_the_old_model_stays() -> None:
    with pytest.raises(AggregationError, match="2 members, 3 are needed"):
        outcome("fedavg", cohort=2, secagg="on")


def test_it_is_refused_where_it_makes_no_sense() -> None:
    for name, options, match in (
        ("fednova", {}, "number of steps"),
        ("local", {}, "nothing is uploaded"),
        ("fedavg", {"rule": "krum", "attackers": 1}, "sees only a sum"),
        ("fedavg", {"secagg_levels": 2**31}, "levels"),
        ("fedavg", {"secagg_minimum": 2}, "at least 3"),
        ("fedavg", {"secagg_clip": 0.0}, "above 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            create_strategy(name, {"secagg": "on", **options})
    with pytest.raises(ConfigError, match="on or off"):
        create_strategy("fedavg", {"secagg": "yes"})


def test_a_variance_is_never_carried_below_zero_and_means_may_be() -> None:
    """A true change of -1e-9 may come back as one step less than it is."""
    specs = (
        TensorSpec("bn.mean", "float32", (1,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
        TensorSpec("bn.var", "float32", (1,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
        TensorSpec("a.weight", "float32", (1,), TensorRole.SHARED, TensorGroup.PARAM),
    )
    upload = UploadSpec(
        (TensorRole.NORM_STAT, TensorRole.SHARED), (TensorGroup.PARAM, TensorGroup.BUFFER), "delta"
    )
    current = {"bn.mean": np.zeros(1), "bn.var": np.array([1e-9]), "a.weight": np.zeros(1)}
    total = SecureSum(np.array([-0.25, -0.5, -STEP]), 7, ("a", "b"))  # in the order of names
    made: Contribution = secure_contribution(specs, upload, current, total)
    tensors = made.load()
    assert float(tensors["bn.var"][0] + np.float32(1e-9)) == 0.0
    assert (float(tensors["bn.mean"][0]), float(tensors["a.weight"][0])) == (-0.5, -0.25)
    assert (made.members, made.num_examples) == (("a", "b"), 7)
