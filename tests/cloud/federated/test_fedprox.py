"""The gradients of FedProx's two proximal terms against automatic differentiation of the terms themselves."""

import numpy as np
import pytest
import torch
from oracles.compiled import compiled_plan
from oracles.plan_runner import run_plan
from oracles.small_federation import arrays, model, splits
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.reference_client import run_client
from wearfleet_models.classifier import Classifier
from wearfleet_protos.errors import ConfigError

MU, RATE = 0.3, 0.05
OPTIONS = {"mu": MU, "batch_size": 64, "learning_rate": RATE}


def term(form: str, network: Classifier, start: dict[str, torch.Tensor]) -> torch.Tensor:
    square = torch.stack([((p - start[n]) ** 2).sum() for n, p in network.named_parameters()]).sum()
    return MU / 2 * (square if form == "squared" else square.sqrt())


def descended(form: str, steps: int) -> dict[str, np.ndarray]:
    """Full-batch gradient descent on the loss and, after the first step, where its gradient exists, the term."""
    network = model("cnn").train()
    start = {n: p.detach().clone() for n, p in network.named_parameters()}
    windows = splits(1)["train"]
    x, y = torch.from_numpy(windows.x), torch.from_numpy(windows.y)
    for step in range(steps):
        network.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x), y)
        (loss + term(form, network, start) if step else loss).backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.sub_(RATE * parameter.grad)
    return {n: p.detach().numpy() - start[n].numpy() for n, p in network.named_parameters()}


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_local_steps_descend_on_the_loss_with_the_term(form: str) -> None:
    strategy = create_strategy("fedprox", {**OPTIONS, "form": form, "epochs": 4})
    update = run_client(
        strategy, model("cnn"), arrays(model("cnn")), {}, splits(1), seed=0, round_number=1
    ).update
    for name, expected in descended(form, 4).items():
        # four steps of float32 sums over 45 x 40 terms in another order: about 4 sqrt(1800) 2^-24 = 1e-5 relative
        np.testing.assert_allclose(update[name], expected, rtol=1e-3, atol=2e-6, err_msg=name)


def test_the_plan_of_the_norm_form_is_its_reference() -> None:
    strategy, network = (
        create_strategy("fedprox", {**OPTIONS, "form": "norm", "batch_size": 16}),
        model("cnn"),
    )
    expected = run_client(strategy, network, arrays(network), {}, splits(1), seed=3, round_number=2)
    plan, graphs = compiled_plan(strategy, network, seed=3)
    state, _, _ = run_plan(plan, graphs, arrays(network), {}, splits(1), round_number=2)
    for tensor, array in expected.state.items():
        error = np.linalg.norm(state[tensor] - array) / max(float(np.linalg.norm(array)), 1e-3)
        assert error < 2e-5, tensor


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="squared or norm"):
        create_strategy("fedprox", {"form": "cubed"})
