"""Per-FedAvg on the device's engine: the oracle's steps, the personal model, refusals."""

import numpy as np
import pytest
import torch
from oracles.edge_rounds import SEED, Federation
from oracles.small_federation import arrays, model, splits
from oracles.torch_clients import Batch, batches_of, descend, gradients, loaded
from wearfleet_cloud.federated import create_strategy
from wearfleet_edge.trainer import personal_tensors
from wearfleet_models.classifier import Classifier
from wearfleet_protos.errors import ConfigError

ALPHA, BETA, SIZE = 0.05, 0.03, 6
OPTIONS = {"alpha": ALPHA, "learning_rate": BETA, "batch_size": SIZE, "epochs": 2}
CLIENTS = {"anna": splits(1)}


def meta_step(network: Classifier, batch: Batch, form: str, delta: float) -> None:
    """Algorithm 1 with copies of the network; only the outer gradient's forward moves its statistics."""
    parts = 2 if form == "first_order" else 3
    first, second, third = ((batch[0][i::parts], batch[1][i::parts]) for i in (0, 1, min(2, parts - 1)))
    start = arrays(network)

    def at(moves: dict[str, torch.Tensor], distance: float) -> Classifier:
        moved = loaded(model("cnn"), start).train()
        descend(moved, -distance, moves)
        return moved

    outer_network = at(gradients(at({}, 0.0), first), -ALPHA)
    outer = gradients(outer_network, second)
    statistics = {n: a for n, a in arrays(outer_network).items() if "running" in n or "tracked" in n}
    direction = dict(outer)
    if form == "hessian_free":
        above, below = (gradients(at(outer, sign * delta), third) for sign in (1, -1))
        direction = {n: g - ALPHA * (above[n] - below[n]) / (2 * delta) for n, g in outer.items()}
    loaded(network, {**start, **statistics})
    descend(network, BETA, direction)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["first_order", "hessian_free"])
def test_a_round_on_the_device_is_that_of_the_oracle(form: str) -> None:
    delta = 0.1  # the finite difference divides rounding by it; at 0.1 nothing of float32 is lost here
    federation = Federation(
        create_strategy("perfedavg", {**OPTIONS, "form": form, "delta": delta}), model("cnn"), CLIENTS
    )
    (result,) = federation.round().values()
    network, parts = model("cnn").train(), 2 if form == "first_order" else 3
    for batch in batches_of(CLIENTS["anna"]["train"], parts * SIZE, 2, seed=SEED, round_number=1):
        meta_step(network, batch, form, delta)
    for name, array in arrays(network).items():
        if array.dtype == np.float32:
            # 8 steps of float32 sums over 6 x 40 terms: 8 sqrt(240) 2^-24 = 8e-6, times 1 / (2 delta) = 5
            error = np.linalg.norm(result.state[name] - array) / max(np.linalg.norm(array), 1e-3)
            assert error < 1e-4, name


@pytest.mark.parametrize("steps", [1, 3])
def test_the_personal_model_is_the_received_one_after_a_few_steps_on_training_windows(steps: int) -> None:
    strategy = create_strategy("perfedavg", {**OPTIONS, "adapt_steps": steps})
    federation = Federation(strategy, model("cnn"), CLIENTS)
    received = dict(federation.tensors)
    (result,) = federation.round().values()
    network = loaded(model("cnn"), received).train()
    for batch in batches_of(CLIENTS["anna"]["train"], SIZE, steps, seed=SEED, round_number=1, most=steps):
        descend(network, ALPHA, gradients(network, batch))
    personal = personal_tensors(federation.plan, dict(result.state))
    for name, array in arrays(network).items():
        np.testing.assert_allclose(personal[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    assert not federation.plan.local_specs()


@pytest.mark.parametrize(
    "options", [{"alpha": 0}, {"delta": -1}, {"form": "second_order"}, {"adapt_steps": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        create_strategy("perfedavg", options)
