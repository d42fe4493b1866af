"""Rounds of EPFL in plain torch and NumPy, client by client."""

from collections.abc import Mapping, Sequence

import numpy as np
from oracles.compiled import compiled_plan
from oracles.edge_rounds import SEED, Split
from oracles.small_federation import arrays
from oracles.torch_clients import Arrays, batches_of, epochs_of_sgd, loaded
from wearfleet_cloud.cli.simulate import device_engine
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.simulate import Outcome, Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import StackedClients
from wearfleet_cloud.federated.wire_clients import WireClients
from wearfleet_models.classifier import Classifier, derived
from wearfleet_models.roles import tensor_roles
from wearfleet_protos.tensors import TensorRole

__all__ = ["mixed_rounds", "stacked_and_wire"]


def mixed_rounds(
    network: Classifier,
    clients: Mapping[str, Split],
    cohorts: Sequence[Sequence[str]],
    *,
    rate: float,
    own_weight: float,
) -> tuple[dict[str, Arrays], dict[str, Arrays]]:
    """What each client receives next, and what it keeps; batches of 16, one epoch a round.

    Source: specs/federated.md section 9.
    """
    roles = tensor_roles(network)
    a, b, head = (
        [n for n, r in roles.items() if r == role]
        for role in (TensorRole.LORA_A, TensorRole.LORA_B, TensorRole.HEAD)
    )
    start, own, kept, last = arrays(network), dict[str, Arrays](), dict[str, Arrays](), dict[str, Arrays]()
    for number, members in enumerate(cohorts, start=1):
        for name in members:
            begin = {**start, **own.get(name, {}), **kept.get(name, {})}
            model = loaded(derived(network), begin).eval()
            parts = batches_of(clients[name]["train"], 16, 1, seed=SEED, round_number=number)
            epochs_of_sgd(model, parts, rate, 0.0, (*a, *b, *head))
            last[name] = arrays(model)
            kept[name] = {n: last[name][n] for n in (*b, *head)}
        for i in last:
            distances = {
                j: sum(float(np.sqrt(((last[i][n] - last[j][n]) ** 2).sum())) for n in b) / len(b)
                for j in last
                if j != i
            }
            total = sum(1 / d for d in distances.values())
            others = {j: (1 - own_weight) / d / total for j, d in distances.items()}
            weights = {i: own_weight, **others}
            own[i] = {
                n: sum(w * last[j][n].astype(float) for j, w in weights.items()).astype(np.float32) for n in a
            }
    return own, kept


def stacked_and_wire(
    strategy: Strategy, network: Classifier, clients: Mapping[str, Split]
) -> tuple[Outcome, Outcome]:
    """Two rounds of stacked clients and of plans on the device's engine: what each client receives must be the same."""
    population = Population([SimulatedClient(n, s["train"], s["holdout"]) for n, s in clients.items()])
    runners = (
        lambda s: StackedClients(s, network, SEED),
        lambda s: WireClients(*compiled_plan(s, network, seed=SEED), device_engine),
    )
    fast, real = (simulate(strategy, network, population, Simulation(2, seed=SEED), run) for run in runners)
    factors = [n for n, role in tensor_roles(network).items() if role == TensorRole.LORA_A]
    for name in clients:
        one, other = (strategy.received(name, found.tensors, found.state) for found in (fast, real))
        for tensor in factors:  # as for the oracle
            assert np.linalg.norm(one[tensor] - other[tensor]) < 2e-4 * np.linalg.norm(other[tensor]), tensor
    return fast, real
