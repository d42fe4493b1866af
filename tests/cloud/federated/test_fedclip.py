"""FedCLIP: the contrast against loops over windows, what is frozen, and what travels."""

import math

import numpy as np
import pytest
import torch
from oracles.edge_rounds import Federation
from oracles.small_federation import model, splits
from torch.func import functional_call
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.client_steps import loss_gradient
from wearfleet_cloud.federated.fedclip import _LOSSES, FedClip
from wearfleet_models import Classifier, derived, tensor_roles, tensor_specs
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole

SPLITS = {"anna": splits(1, 45, 21), "ben": splits(2, 20, 30)}


def frozen_model() -> Classifier:
    return FedClip().network(model("cnn"), seed=3)


def by_loops(logits: np.ndarray, y: np.ndarray, weight: np.ndarray, *, by_class: bool) -> float:
    """The mean over windows of half the cross-entropy of rows and half that of columns, window by window."""
    there = [i for i in range(len(y)) if weight[i] > 0]
    if len(there) < 2:
        return 0.0
    total = 0.0
    for i in there:
        alike = [j for j in there if y[j] == y[i]] if by_class else [i]
        row = math.log(sum(math.exp(logits[i, y[j]]) for j in there))
        column = math.log(sum(math.exp(logits[j, y[i]]) for j in there))
        total += sum(row - logits[i, y[j]] for j in alike) / len(alike) / 2
        total += sum(column - logits[j, y[i]] for j in alike) / len(alike) / 2
    return total / len(there)


@pytest.mark.parametrize("target", ["identity", "class_soft"])
@pytest.mark.parametrize("present", [9, 2, 1])
def test_the_contrast_is_that_of_loops_over_windows(target: str, present: int) -> None:
    generator = np.random.default_rng(present)
    logits, y = generator.normal(size=(9, 4)), generator.integers(0, 4, 9)
    weight = (np.arange(9) < present).astype(float)
    given = {"y": torch.from_numpy(y), "weight": torch.from_numpy(weight)}
    loss = _LOSSES[target](torch.zeros(9, 1), torch.from_numpy(logits), given)
    expected = by_loops(logits, y, weight, by_class=target == "class_soft")
    assert float(loss) == pytest.approx(expected, abs=1e-12)  # float64, 9 x 9 terms


def test_the_adapter_scales_every_number_of_the_embedding_and_equal_attention_changes_nothing() -> None:
    network = frozen_model()
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in (network.neck.first, network.neck.second):
            layer.weight.zero_()
            layer.bias.zero_()
        plain = derived(network, neck="none", frozen="none").eval()
        # softmax of equal numbers is 1/F in float32; 224 F products
        torch.testing.assert_close(network.eval()(x), plain(x), rtol=1e-5, atol=1e-5)


def test_only_the_adapter_is_trained_and_sent() -> None:
    network = frozen_model()
    federation = Federation(create_strategy("fedclip", {"batch_size": 16, "epochs": 2}), network, SPLITS)
    before = {name: array.copy() for name, array in federation.tensors.items()}
    federation.round()
    changed = {n for n, array in federation.tensors.items() if not np.array_equal(array, before[n])}
    adapter = {f"neck.{layer}.{part}" for layer in ("first", "second") for part in ("weight", "bias")}
    assert changed == adapter
    roles = tensor_roles(network)
    assert {n for n, role in roles.items() if role == TensorRole.SHARED} == adapter
    assert {roles[n] for n in roles if n not in adapter} == {TensorRole.FROZEN, TensorRole.COUNTER}


def test_the_gradient_is_that_of_the_loss_by_finite_differences() -> None:
    network = frozen_model().double()
    specs = tensor_specs(network)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    data = SPLITS["anna"]["train"]
    given = {
        **state,
        "x": torch.from_numpy(data.x[:16]).double(),
        "y": torch.from_numpy(data.y[:16]),
        "weight": torch.ones(16, dtype=torch.float64),
        "rng": torch.zeros((), dtype=torch.int64),
    }
    params = {n: state[n] for n, role in tensor_roles(network).items() if role == TensorRole.SHARED}
    grads, buffers, _ = loss_gradient(network, specs, loss=_LOSSES["identity"])(params, given)
    assert not buffers

    def loss(step: float) -> float:
        moved = {**state, **{n: t + step * grads[n] for n, t in params.items()}}
        with torch.no_grad():
            logits = functional_call(network.eval(), moved, (given["x"],))
        return float(_LOSSES["identity"](logits, logits, given))

    squared = sum(float((g * g).sum()) for g in grads.values())
    step = 1e-4  # central difference: error of order step^2
    assert (loss(step) - loss(-step)) / (2 * step) == pytest.approx(squared, rel=1e-5)


def test_a_model_that_it_cannot_adapt_is_refused() -> None:
    with pytest.raises(ConfigError, match="neck bottleneck"):
        FedClip().network(derived(model("cnn"), neck="bottleneck"), seed=0)
    with pytest.raises(ConfigError, match="derive one"):
        FedClip().client(model("cnn"))
    with pytest.raises(ConfigError, match="identity or class_soft"):
        create_strategy("fedclip", {"target": "both"})
