"""RSC: which features it hides, in which windows, against a literal transcription with NumPy's quantiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import batch, build, step
from torch import Tensor
from torch.func import functional_call
from wearfleet_cloud.algorithms.rsc import quantile
from wearfleet_cloud.training.optimisers import Sgd


def _hidden_by_definition(logits_of, z: Tensor, y: Tensor, f: float, b: float) -> Tensor:
    """(B, F) of 1 and 0, window by window, the gradient by autograd and the quantiles by NumPy."""
    leaf = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(logits_of(leaf).gather(1, y[:, None]).sum(), leaf)
    thresholds = np.percentile(g.numpy(), 100.0 * (1.0 - f), axis=1)
    quiet = torch.stack([(row < q).double() for row, q in zip(g, thresholds, strict=True)])
    before, after = (torch.softmax(logits_of(v), 1).gather(1, y[:, None])[:, 0] for v in (z, z * quiet))
    change = before - after
    intact = change < np.percentile(change.numpy(), 100.0 * (1.0 - b))
    return torch.maximum(quiet, intact[:, None].double())


@pytest.mark.parametrize(("f", "b"), [(1 / 3, 1 / 3), (0.5, 0.2), (0.0, 0.0), (0.1, 1.0)])
def test_the_loss_and_its_gradient_are_those_of_the_definition(f: float, b: float) -> None:
    rsc = build("rsc", Sgd())
    rsc.model.double()
    state, given = rsc.init(), batch(rsc)
    given = given._replace(x=given.x.double())
    params = {n: p.clone().requires_grad_() for n, p in state.params.items()}

    class Embedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = rsc.model

        def forward(self, x: Tensor) -> Tensor:
            return self.model.features(x)

    tensors = {f"model.{n}": t for n, t in (*params.items(), *state.buffers.items())}
    z = functional_call(Embedding(), tensors, (given.x.flatten(0, 1),))
    y = given.y.flatten()
    mask = _hidden_by_definition(
        lambda v: v @ state.params["head.weight"].T + state.params["head.bias"], z.detach(), y, f, b
    )
    loss = F.cross_entropy((z * mask) @ params["head.weight"].T + params["head.bias"], y)
    grads = torch.autograd.grad(loss, list(params.values()))
    after, metrics = rsc.step(
        state,
        given,
        {"lr": torch.tensor(1.0).double(), "features": torch.tensor(f), "windows": torch.tensor(b)},
        torch.tensor(0),
    )
    torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(metrics["hidden"], 1.0 - mask.mean(), rtol=1e-6, atol=1e-12)
    for (name, p), g in zip(params.items(), grads, strict=True):
        torch.testing.assert_close(p.detach() - after.params[name], g, rtol=1e-9, atol=1e-12)


def test_rsc_that_hides_nothing_is_erm_but_for_the_largest_feature_of_one_window() -> None:
    """With f = b = 0 both quantiles are maxima, and what lies at the maximum is still hidden (specs/ood.md 7, T1)."""
    rsc, erm = build("rsc", Sgd()), build("erm", Sgd())
    state, given = rsc.init(), batch(rsc)
    _, metrics = step(rsc, state, given, features=0.0, windows=0.0)
    _, plain = step(erm, state, given)
    shape = (given.y.numel(), state.params["head.weight"].shape[1])
    assert float(metrics["hidden"]) == pytest.approx(1.0 / (shape[0] * shape[1]), rel=0.01)
    torch.testing.assert_close(metrics["accuracy"], plain["accuracy"])


def test_hiding_the_features_of_the_right_class_raises_the_loss() -> None:
    rsc = build("rsc", Sgd())
    state, given = rsc.init(), batch(rsc, windows=16)
    losses = [
        float(step(rsc, state, given, features=f, windows=1.0)[1]["loss"]) for f in (0.0, 0.2, 0.35, 0.5)
    ]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 0.1


@pytest.mark.parametrize("share", [0.0, 0.25, 2 / 3, 0.9, 1.0])
@pytest.mark.parametrize("size", [1, 2, 63])
def test_quantile_is_numpys(share: float, size: int) -> None:
    values = torch.randn(3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    expected = np.quantile(values.numpy(), share, axis=1)
    ours = quantile(values, torch.tensor(share, dtype=torch.float64))
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_windows_without_weight_do_not_count() -> None:
    values, weight = torch.tensor([5.0, -9.0, 1.0, 9.0]), torch.tensor([0.5, 0.0, 2.0, 0.0])
    assert float(quantile(values, torch.tensor(0.25), weight)) == 2.0
