"""Ten steps of a plan give what ten steps of torch give: autograd, torch.optim, the model's own layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from oracles.plan_runner import open_graph, run_step
from oracles.small_federation import CHANNELS, CLASSES, CONTRACT, WINDOW, arrays, model
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_protos.tensors import TensorGroup

BATCH, STEPS = 16, 10
OPTIMISERS = {
    "sgd": {"learning_rate": 0.05},
    "momentum": {"learning_rate": 0.02, "momentum": 0.9, "weight_decay": 1e-3},
    "adam": {"optimiser": "adam", "learning_rate": 1e-3},
}


def batch(step: int, window: int = WINDOW) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(step)
    weight = np.ones(BATCH, np.float32)
    x = generator.normal(size=(BATCH, CHANNELS, window)).astype(np.float32)
    if step % 3 == 2:  # a short last batch
        weight[5:], x[5:] = 0, 0
    return {
        "x": x,
        "y": generator.integers(0, CLASSES, BATCH),
        "weight": weight,
        "rng": np.asarray(1000 + step, np.int64),
    }


def torch_steps(
    backbone: str, options: dict[str, object], window: int = WINDOW
) -> tuple[dict[str, np.ndarray], list[float]]:
    network = model(backbone, window=window).train()
    if options.get("optimiser") == "adam":
        optimiser = torch.optim.Adam(network.parameters(), lr=options["learning_rate"])
    else:
        optimiser = torch.optim.SGD(
            network.parameters(),
            lr=options["learning_rate"],
            momentum=options.get("momentum", 0.0),
            weight_decay=options.get("weight_decay", 0.0),
        )
    losses = []
    for step in range(STEPS):
        given = {name: torch.from_numpy(array) for name, array in batch(step, window).items()}
        optimiser.zero_grad()
        logits = network(given["x"], given["weight"], given["rng"])
        each = F.cross_entropy(logits, given["y"], reduction="none")
        loss = (each * given["weight"]).sum() / given["weight"].sum()
        loss.backward()
        optimiser.step()
        losses.append(float((each.detach() * given["weight"]).sum()))
    return arrays(network), losses


def plan_steps(
    backbone: str, options: dict[str, object], window: int = WINDOW
) -> tuple[dict[str, np.ndarray], list[float]]:
    network = model(backbone, window=window)
    strategy = create_strategy("fedavg", {**options, "batch_size": BATCH})
    plan, graphs = build_plan(strategy, network, replace(CONTRACT, window=window), plan_id="test")
    (phase,) = (p for p in plan.phases if p.name == "train")
    state = {s.name: np.zeros(s.shape, s.dtype) for s in plan.tensors} | arrays(network)
    session = open_graph(graphs[phase.graph])
    losses = []
    for step in range(STEPS):
        changed, metrics = run_step(session, phase, state, batch(step, window))
        state |= changed
        losses.append(metrics["loss_sum"])
    model_names = {s.name for s in plan.tensors if s.group in (TensorGroup.PARAM, TensorGroup.BUFFER)}
    return {name: array for name, array in state.items() if name in model_names}, losses


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))


def defined(tensors: dict[str, np.ndarray], optimiser: str) -> dict[str, np.ndarray]:
    """Without the numbers whose gradient is exactly 0 in exact arithmetic, when Adam scales them.

    A constant before batch normalisation (the bias of a convolution, and with it the running mean) and a constant
    added to all keys of an attention change nothing. Their computed gradient is rounding noise, and Adam makes a full
    step of noise: two correct implementations disagree.
    """
    if optimiser != "adam":
        return tensors
    kept = {}
    for name, array in tensors.items():
        if name.endswith("qkv.bias"):
            width = len(array) // 3
            kept[name] = np.concatenate([array[:width], array[2 * width :]])
        elif not name.endswith(("conv1.bias", "conv2.bias", "running_mean")):
            kept[name] = array
    return kept


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("backbone", ["cnn", pytest.param("transformer", marks=pytest.mark.slow)])
def test_ten_steps_of_the_plan_are_ten_steps_of_torch(backbone: str, optimiser: str) -> None:
    expected, losses = torch_steps(backbone, OPTIMISERS[optimiser])
    actual, plan_losses = plan_steps(backbone, OPTIMISERS[optimiser])
    assert actual.keys() == expected.keys()
    np.testing.assert_allclose(plan_losses, losses, rtol=1e-5)
    expected, actual = defined(expected, optimiser), defined(actual, optimiser)
    worst = {name: relative(actual[name], expected[name]) for name in expected}
    assert max(worst.values()) < 1e-5, sorted(worst.items(), key=lambda item: -item[1])[:3]


def test_odd_lengths_that_pooling_crops_have_the_gradients_of_torch() -> None:
    """43 samples leave 39 and 15 behind the convolutions; the last of each is dropped, and its gradient is 0."""
    expected, _ = torch_steps("cnn", OPTIMISERS["momentum"], window=43)
    actual, _ = plan_steps("cnn", OPTIMISERS["momentum"], window=43)
    assert max(relative(actual[name], expected[name]) for name in expected) < 1e-5


def test_a_wrong_learning_rate_would_be_noticed() -> None:
    expected, _ = torch_steps("cnn", {"learning_rate": 0.05})
    actual, _ = plan_steps("cnn", {"learning_rate": 0.05 * 1.001})
    assert max(relative(actual[name], expected[name]) for name in expected) > 1e-5


def test_adam_leaves_the_same_function_where_single_numbers_are_undefined() -> None:
    trained = []
    for tensors, _ in (torch_steps("cnn", OPTIMISERS["adam"]), plan_steps("cnn", OPTIMISERS["adam"])):
        network = model("cnn")
        network.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
        given = {name: torch.from_numpy(array) for name, array in batch(99).items()}
        trained.append(network.train()(given["x"], given["weight"], given["rng"]).detach())
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-5)
