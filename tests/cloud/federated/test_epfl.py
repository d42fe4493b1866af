"""EPFL: rounds on the device's engine equal the oracle's; what is frozen, mixed and kept; sketches keep distances."""

import numpy as np
import pytest
import torch
from oracles.edge_rounds import SEED, Federation
from oracles.epfl import mixed_rounds, stacked_and_wire
from oracles.small_federation import arrays, model, splits
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.factor_masks import HELD
from wearfleet_cloud.federated.factor_sketches import sketch_phase
from wearfleet_cloud.federated.training_options import LocalTraining
from wearfleet_models.classifier import derived
from wearfleet_models.roles import tensor_roles
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole

CLIENTS = {"anna": splits(1), "ben": splits(2, 32), "cleo": splits(3, 20)}
STRATEGY = create_strategy("epfl", {"batch_size": 16, "learning_rate": 0.05, "own_weight": 0.4, "rank": 4})
NETWORK = STRATEGY.network(model("transformer"), SEED)
ROLES = tensor_roles(NETWORK)
A, B, HEAD = (
    [n for n, r in ROLES.items() if r == role]
    for role in (TensorRole.LORA_A, TensorRole.LORA_B, TensorRole.HEAD)
)
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
        for tensor, array in own[name].items():
            # 3 rounds of at most 3 steps of float32 sums over 64 numbers and 16 windows; B is small, and so are the
            # distances that weights are made of: 9 sqrt(1024) 2^-24 = 2e-5, ten times for them
            error = np.linalg.norm(received[tensor] - array) / np.linalg.norm(array)
            assert error < 2e-4, tensor
        for tensor, array in kept[name].items():
            error = np.linalg.norm(federation.local[name][tensor] - array) / max(np.linalg.norm(array), 1e-3)
            assert error < 2e-3, tensor


@pytest.mark.slow
def test_stacked_clients_give_the_factors_of_the_wire() -> None:
    fast, real = stacked_and_wire(STRATEGY, NETWORK, CLIENTS)
    assert [r.bytes_up for r in fast.rounds] == [r.bytes_up for r in real.rounds]


def test_only_factors_a_and_sketches_are_sent_and_the_rest_is_frozen(federation: Federation) -> None:
    plan = federation.plan
    assert {s.name for s in plan.upload_specs() if s.role == TensorRole.LORA_A} == set(A)
    assert {s.name for s in plan.local_specs()} == {*B, *HEAD}
    (train,) = [p for p in plan.phases if p.name == "train"]
    assert {o.target for o in train.outputs if o.kind == "state"} == {*A, *B, *HEAD}
    for tensor, array in arrays(NETWORK).items():
        assert np.array_equal(federation.tensors[tensor], array) == (tensor not in A), tensor
    models = [federation.strategy.received(n, federation.tensors, federation.state) for n in CLIENTS]
    assert not np.array_equal(models[0][A[0]], models[1][A[0]])


def test_a_new_network_answers_as_the_one_it_was_derived_from() -> None:
    plain, x = model("transformer").eval(), torch.from_numpy(CLIENTS["anna"]["train"].x)
    with torch.no_grad():
        torch.testing.assert_close(NETWORK.eval()(x), plain(x), rtol=0, atol=1e-6)
    assert {ROLES[n] for n in plain.state_dict()} == {TensorRole.FROZEN, TensorRole.HEAD}


def test_sketches_of_large_factors_keep_distances() -> None:
    network = derived(model("transformer"), lora_rank=16, frozen="backbone")
    phase, specs = sketch_phase(network, LocalTraining())
    assert {s.shape for s in specs} == {(16, 16), ()}
    generator = torch.Generator().manual_seed(1)
    factors = [
        {
            n: torch.randn(t.shape, generator=generator)
            for n, t in network.state_dict().items()
            if n.endswith("_b")
        }
        for _ in range(2)
    ]
    sketches = [phase.step({**f, HELD: torch.ones(16)}) for f in factors]
    for layer, name in enumerate(n for n in network.state_dict() if n.endswith("_b")):
        exact = float((factors[0][name] - factors[1][name]).norm())
        sketched = float((sketches[0][f"sketch/{layer}"] - sketches[1][f"sketch/{layer}"]).norm())
        # relative standard deviation of the square is sqrt(2 / 256) = 9 %, of the root half of it; four of them
        assert abs(sketched / exact - 1.0) < 0.18
        few = [(f[name][:, :4], s[f"sketch/{layer}"][:4]) for f, s in zip(factors, sketches, strict=True)]
        exact, sketched = (float((one - other).norm()) for one, other in zip(*few, strict=True))
        # 4 columns of 16 numbers: sqrt(2 / 64) = 18 %, as above
        assert abs(sketched / exact - 1.0) < 0.36


def test_other_backbones_and_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="belong to the transformer"):
        STRATEGY.network(model("cnn"), SEED)
    with pytest.raises(ConfigError, match="rank 4"):
        STRATEGY.client(derived(model("transformer"), lora_rank=2, frozen="backbone"))
    with pytest.raises(ConfigError, match="rank"):
        create_strategy("epfl", {"rank": 0})
    with pytest.raises(ConfigError, match="layers"):
        create_strategy("epfl", {"layers": "third"})
