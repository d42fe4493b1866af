"""The pure optimisers make the steps of torch.optim."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from wearfleet_cloud.training.optimisers import Adam, Lars, Optimiser, Sgd
from wearfleet_protos.errors import ConfigError

_LR = 0.03


def _params() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (3, 2, 4), "a.bias": (3,), "scale": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _grads(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in _params().items()}


_CASES: list[tuple[Optimiser, Callable[[list[Tensor]], torch.optim.Optimizer]]] = [
    (Sgd(), lambda p: torch.optim.SGD(p, _LR)),
    (Sgd(momentum=0.9), lambda p: torch.optim.SGD(p, _LR, momentum=0.9)),
    (
        Sgd(momentum=0.5, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, _LR, momentum=0.5, weight_decay=0.1),
    ),
    (Adam(), lambda p: torch.optim.Adam(p, _LR)),
    (
        Adam(betas=(0.5, 0.9), eps=1e-6, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, _LR, betas=(0.5, 0.9), eps=1e-6, weight_decay=0.1),
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), _CASES, ids=[repr(case[0]) for case in _CASES])
def test_twenty_steps_are_those_of_torch(ours: Optimiser, theirs) -> None:
    params, slots = _params(), ours.init(_params())
    leaves = {name: p.clone() for name, p in params.items()}
    reference = theirs(list(leaves.values()))
    for step in range(20):
        params, slots = ours.update(params, _grads(step), slots, torch.tensor(_LR))
        for name, grad in _grads(step).items():
            leaves[name].grad = grad
        reference.step()
        torch.testing.assert_close(params, leaves, rtol=2e-6, atol=2e-7)  # 20 roundings of 6e-8


def test_lars_steps_are_those_of_its_formula() -> None:
    """Numbers one by one; torch has no LARS."""
    lars = Lars(momentum=0.5, weight_decay=0.1, trust=0.02)
    params, slots = _params(), lars.init(_params())
    slow = {name: p.flatten().tolist() for name, p in params.items()}
    moving = {name: [0.0] * len(p) for name, p in slow.items()}
    for step in range(5):
        params, slots = lars.update(params, _grads(step), slots, torch.tensor(_LR))
        for name, grad in _grads(step).items():
            g, share = grad.flatten().tolist(), 1.0
            if grad.dim() > 1:
                g = [v + 0.1 * p for v, p in zip(g, slow[name], strict=True)]
                share = 0.02 * sum(p * p for p in slow[name]) ** 0.5 / sum(v * v for v in g) ** 0.5
            moving[name] = [0.5 * m + share * v for m, v in zip(moving[name], g, strict=True)]
            slow[name] = [p - _LR * m for p, m in zip(slow[name], moving[name], strict=True)]
    for name, p in params.items():
        torch.testing.assert_close(p.flatten(), torch.tensor(slow[name]), rtol=2e-6, atol=2e-7)


def test_lars_goes_on_from_weights_or_gradients_of_zero() -> None:
    zero, one = {"w": torch.zeros(2, 2)}, {"w": torch.ones(2, 2)}
    lars = Lars()
    assert lars.update(zero, one, lars.init(zero), torch.tensor(0.5))[0]["w"].eq(-0.5).all()
    assert lars.update(one, zero, lars.init(one), torch.tensor(0.5))[0]["w"].eq(1.0).all()


@pytest.mark.parametrize("optimiser", [*(case[0] for case in _CASES), Lars(weight_decay=0.1)], ids=repr)
def test_an_update_changes_nothing_it_was_given(optimiser: Optimiser) -> None:
    params, grads, slots = _params(), _grads(0), optimiser.init(_params())
    copies = [{name: t.clone() for name, t in tensors.items()} for tensors in (params, grads, slots)]
    optimiser.update(params, grads, slots, torch.tensor(_LR))
    for now, before in zip((params, grads, slots), copies, strict=True):
        torch.testing.assert_close(now, before, rtol=0.0, atol=0.0)


def test_slots_have_the_names_of_the_contract() -> None:
    params = {"w": torch.zeros(2)}
    assert set(Sgd(momentum=0.9).init(params)) == {"momentum/w"}
    assert Sgd().init(params) == {}
    slots = Adam().init(params)
    assert set(slots) == {"adam_m/w", "adam_v/w", "adam_step"}
    assert (slots["adam_step"].dtype, slots["adam_step"].shape) == (torch.float32, ())


@pytest.mark.parametrize("optimiser", [*(case[0] for case in _CASES), Lars(weight_decay=0.1)], ids=repr)
def test_stacked_updates_equal_single_ones(optimiser: Optimiser) -> None:
    rates = torch.tensor([0.01, 0.1])
    start, slots, first, second = _params(), optimiser.init(_params()), _grads(0), _grads(1)

    def two_steps(rate: Tensor) -> dict[str, Tensor]:
        params, after = optimiser.update(start, first, slots, rate)
        return optimiser.update(params, second, after, rate)[0]

    stacked = vmap(two_steps)(rates)
    for run, rate in enumerate(rates):
        single = two_steps(rate)
        torch.testing.assert_close({n: p[run] for n, p in stacked.items()}, single, rtol=1e-6, atol=1e-7)


def test_a_traced_update_counts_its_steps() -> None:
    adam = Adam()

    def update(params, grads, slots, lr):
        return adam.update(params, grads, slots, lr)

    traced = make_fx(update)(_params(), _grads(0), adam.init(_params()), torch.tensor(_LR))
    params, slots = _params(), adam.init(_params())
    expected, expected_slots = _params(), adam.init(_params())
    for step in range(3):
        params, slots = traced(params, _grads(step), slots, torch.tensor(_LR))
        expected, expected_slots = adam.update(expected, _grads(step), expected_slots, torch.tensor(_LR))
    assert float(slots["adam_step"]) == 3.0
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Sgd(momentum=1.0),
        lambda: Sgd(weight_decay=-1.0),
        lambda: Adam(betas=(0.9, 1.0)),
        lambda: Adam(betas=(-0.1, 0.9)),
        lambda: Adam(eps=0.0),
        lambda: Lars(trust=0.0),
    ],
)
def test_settings_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ConfigError):
        wrong()
