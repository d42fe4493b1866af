"""FedPer and FedRep on the device's engine: the oracle's rounds, heads that never leave, refusals."""

import numpy as np
import pytest
from oracles.edge_rounds import SEED, Federation
from oracles.small_federation import arrays, model, splits
from oracles.torch_clients import batches_of, epochs_of_sgd, loaded
from wearfleet_cloud.federated import create_strategy
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole

OPTIONS = {"batch_size": 16, "learning_rate": 0.05, "momentum": 0.9}
RATES = (0.05, 0.9)
CLIENTS = {"anna": splits(1), "ben": splits(2, 32)}
HEAD = ("head.weight", "head.bias")
ROUNDS = 2


def oracle_client(name: str, tensors: dict[str, np.ndarray], windows, number: int) -> dict[str, np.ndarray]:
    network = loaded(model("cnn"), tensors)
    body = [n for n, _ in network.named_parameters() if n not in HEAD]

    def parts(epochs: int):
        return batches_of(windows, 16, epochs, seed=SEED, round_number=number)

    if name == "fedper":
        epochs_of_sgd(network.train(), parts(1), *RATES, [*body, *HEAD])
    else:
        epochs_of_sgd(network.eval(), parts(3), *RATES, HEAD)
        epochs_of_sgd(network.train(), parts(1), *RATES, body)
    return arrays(network)


def oracle(name: str) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Global tensors and the clients' own heads after the rounds."""
    tensors, heads = arrays(model("cnn")), {}
    weights = {n: len(s["train"].y) for n, s in CLIENTS.items()}
    for number in range(1, ROUNDS + 1):
        results = {
            n: oracle_client(name, {**tensors, **heads.get(n, {})}, s["train"], number)
            for n, s in CLIENTS.items()
        }
        heads = {n: {h: r[h] for h in HEAD} for n, r in results.items()}
        total = sum(weights.values())
        mean = {t: sum(weights[n] / total * r[t].astype(float) for n, r in results.items()) for t in tensors}
        for norm in ("backbone.norm1", "backbone.norm2"):
            mean[f"{norm}.running_var"] += sum(
                weights[n] / total * (r[f"{norm}.running_mean"] - mean[f"{norm}.running_mean"]) ** 2
                for n, r in results.items()
            )
        tensors = {t: (tensors if t in HEAD else mean)[t].astype(tensors[t].dtype) for t in tensors}
    return tensors, heads


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_rounds_on_the_device_are_those_of_the_oracle(name: str) -> None:
    options = {**OPTIONS, **({"head_epochs": 3} if name == "fedrep" else {})}
    federation = Federation(create_strategy(name, options), model("cnn"), CLIENTS)
    for _ in range(ROUNDS):
        federation.round()
    tensors, heads = oracle(name)
    for tensor, array in tensors.items():
        if array.dtype == np.float32:
            # up to 24 steps of float32 sums over 16 x 40 terms in another order: 24 sqrt(640) 2^-24 = 4e-5
            error = np.linalg.norm(federation.tensors[tensor] - array) / max(np.linalg.norm(array), 1e-3)
            assert error < 1e-4, tensor
    for client, head in heads.items():
        assert federation.local[client].keys() == set(HEAD)
        for tensor, array in head.items():
            np.testing.assert_allclose(federation.local[client][tensor], array, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_heads_are_not_sent_and_the_global_one_stays(name: str) -> None:
    federation = Federation(create_strategy(name, OPTIONS), model("cnn"), CLIENTS)
    assert {s.role for s in federation.plan.local_specs()} == {TensorRole.HEAD}
    assert not {s.role for s in federation.plan.upload_specs()} & {TensorRole.HEAD, TensorRole.FROZEN}
    before = {name: federation.tensors[name].copy() for name in HEAD}
    federation.round()
    for tensor, array in before.items():
        np.testing.assert_array_equal(federation.tensors[tensor], array)
        assert not np.array_equal(federation.local["anna"][tensor], federation.local["ben"][tensor])


def test_a_head_of_a_round_that_did_not_count_is_not_kept() -> None:
    federation = Federation(create_strategy("fedrep", OPTIONS), model("cnn"), CLIENTS)
    federation.round(lost=["ben"])
    assert federation.local.keys() == {"anna"}


def test_the_head_phase_of_fedrep_changes_the_head_alone() -> None:
    federation = Federation(create_strategy("fedrep", OPTIONS), model("cnn"), CLIENTS)
    roles = {s.name: s.role for s in federation.plan.tensors if s.group in ("param", "buffer")}
    writes = {
        p.name: {roles[o.target] for o in p.outputs if o.target in roles} for p in federation.plan.phases
    }
    assert writes["train_head"] == {TensorRole.HEAD}
    assert writes["train_body"] == {
        TensorRole.SHARED, TensorRole.NORM_AFFINE, TensorRole.NORM_STAT, TensorRole.COUNTER
    }  # fmt: skip


def test_fedrep_without_epochs_for_the_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="head_epochs"):
        create_strategy("fedrep", {"head_epochs": 0})
