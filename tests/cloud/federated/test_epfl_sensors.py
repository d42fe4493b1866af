"""EPFL on windows of several sensors: rounds on the device's engine equal the oracle's; who lacks a sensor."""

from dataclasses import replace

import numpy as np
import pytest
from oracles.edge_rounds import SEED, Federation
from oracles.epfl import mixed_rounds, stacked_and_wire
from oracles.small_federation import CHANNELS, CLASSES, WINDOW, arrays, splits
from wearfleet_cloud.federated import create_strategy
from wearfleet_models.classifier import ModelSpec, build_classifier
from wearfleet_models.roles import tensor_roles
from wearfleet_protos.tensors import TensorRole
from wearfleet_protos.windowing import LabelledWindows

SENSORS = (0, 1, 0)
GONE = "backbone.encoders.0."


def without_sensor(windows: LabelledWindows) -> LabelledWindows:
    """Channels 0 and 2 at a number that a driver might fill in."""
    x = windows.x.copy()
    x[:, ::2] = -1.0
    return replace(windows, x=x)


CLIENTS = {
    "anna": splits(1),
    "ben": splits(2, 32),
    "cleo": {name: without_sensor(part) for name, part in splits(3, 20).items()},
}
STRATEGY = create_strategy("epfl", {"batch_size": 16, "learning_rate": 0.05, "own_weight": 0.4, "rank": 4})
SPEC = ModelSpec(
    "multimodal-transformer", CHANNELS, WINDOW, CLASSES, kernel=5, feedforward=32, modalities=SENSORS
)
NETWORK = STRATEGY.network(build_classifier(SPEC), SEED)
ROLES = tensor_roles(NETWORK)
A, B = ([n for n, r in ROLES.items() if r == role] for role in (TensorRole.LORA_A, TensorRole.LORA_B))
COHORTS = (("anna", "ben", "cleo"), ("anna", "ben"), ("ben", "cleo"))


@pytest.fixture(scope="module")
def federation() -> Federation:
    """After the rounds of ``COHORTS``."""
    made = Federation(STRATEGY, NETWORK, CLIENTS)
    for members in COHORTS:
        made.round(members)
    return made


def test_rounds_on_the_device_are_those_of_the_oracle(federation: Federation) -> None:
    own, kept = mixed_rounds(NETWORK, CLIENTS, COHORTS, rate=0.05, own_weight=0.4)
    for name in CLIENTS:
        received = federation.strategy.received(name, federation.tensors, federation.state)
        for expected, found, tolerance in (
            # as in test_epfl; a factor B that was never trained is 0 in both
            (own[name], received, 2e-4),
            (kept[name], federation.local[name], 2e-3),
        ):
            for tensor, array in expected.items():
                error = np.linalg.norm(found[tensor] - array) / max(np.linalg.norm(array), 1e-3)
                assert error < tolerance, (name, tensor)


def test_factors_of_every_sensor_are_mixed(federation: Federation) -> None:
    anna, ben = (
        federation.strategy.received(name, federation.tensors, federation.state) for name in ("anna", "ben")
    )
    start = arrays(NETWORK)
    for tensor in A:
        # channel 1 alone is a sensor of one token, whose queries learn nothing
        learned = "encoders.1." not in tensor or "value" in tensor
        assert (not np.array_equal(anna[tensor], start[tensor])) == learned, tensor
        assert (not np.array_equal(anna[tensor], ben[tensor])) == learned, tensor


@pytest.mark.slow
def test_who_lacks_a_sensor_leaves_its_factors_as_they_came() -> None:
    federation = Federation(STRATEGY, NETWORK, CLIENTS)
    _, update = federation.client("cleo")
    moved = {tensor for tensor in A if np.any(update[tensor] != 0)}
    trained = {tensor for tensor in B if np.any(federation.client("cleo")[0].state[tensor] != 0)}
    assert not {tensor for tensor in moved | trained if tensor.startswith(GONE)}
    assert {tensor for tensor in trained if "value" in tensor} == {
        tensor for tensor in B if "encoders.1." in tensor and "value" in tensor
    }


@pytest.mark.slow
def test_stacked_clients_give_the_factors_of_the_wire() -> None:
    fast, real = stacked_and_wire(STRATEGY, NETWORK, CLIENTS)
    assert [r.bytes_up for r in fast.rounds] == [r.bytes_up for r in real.rounds]
