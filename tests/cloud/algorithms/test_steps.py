"""Laws of every algorithm of the registry, and of the ground they stand on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import CHOICES, DOMAINS, batch, build, hyper, model, started, step
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from wearfleet_cloud.algorithms import ALGORITHMS, Batch, State, build_algorithm
from wearfleet_cloud.algorithms.gradients import descend, gradient, gradients
from wearfleet_cloud.training.optimisers import Adam, Sgd
from wearfleet_protos.errors import ConfigError

_IDS = ["-".join([name, *options.values()]) for name, options in CHOICES]
_STACKED = [choice for choice in CHOICES if not ALGORITHMS[choice[0]].info.alone]
_STACKED_IDS = ["-".join([name, *options.values()]) for name, options in _STACKED]


def _assert_states_equal(ours: State, other: State, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(tuple(ours), tuple(other), rtol=10 * tolerance, atol=tolerance)


def _stack(*dicts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.stack([d[n] for d in dicts]) for n in dicts[0]}


def test_erm_is_plain_training_with_torch() -> None:
    algorithm = build("erm", Sgd(momentum=0.9))
    state, given = algorithm.init(), batch(algorithm)
    reference = model()
    optimiser = torch.optim.SGD(reference.parameters(), 0.05, momentum=0.9)
    for _ in range(3):
        state, metrics = step(algorithm, state, given)
        loss = F.cross_entropy(reference(given.x.flatten(0, 1)), given.y.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    tensors = {**state.params, **state.buffers}
    torch.testing.assert_close(tensors, dict(reference.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), CHOICES, ids=_IDS)
@pytest.mark.parametrize("backbone", ["cnn", "transformer"])
def test_a_step_changes_nothing_it_was_given(name: str, options: dict, backbone: str) -> None:
    algorithm = build(name, Adam(), options, backbone=backbone)
    before = {n: t.clone() for n, t in algorithm.model.state_dict().items()}
    state, given = started(algorithm), batch(algorithm)
    copies = [{n: t.clone() for n, t in part.items()} for part in state]
    again = [step(algorithm, state, given, 3) for _ in range(2)]
    torch.testing.assert_close(list(state), copies, rtol=0.0, atol=0.0)
    torch.testing.assert_close(dict(algorithm.model.state_dict()), before, rtol=0.0, atol=0.0)
    _assert_states_equal(again[0][0], again[1][0], 1e-7)
    moved = [n for n, p in again[0][0].params.items() if not torch.equal(p, state.params[n])]
    assert moved
    assert {"loss", "accuracy"} <= set(again[0][1])
    assert all(value.shape == () and not value.requires_grad for value in again[0][1].values())


@pytest.mark.parametrize(("name", "options"), CHOICES, ids=_IDS)
def test_a_state_keeps_its_names_and_shapes(name: str, options: dict) -> None:
    algorithm = build(name, Adam(), options)
    state = started(algorithm)
    after, _ = step(algorithm, state, batch(algorithm))
    for before, now in zip(state, after, strict=True):
        assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
            n: (t.shape, t.dtype) for n, t in now.items()
        }


@pytest.mark.parametrize(("name", "options"), CHOICES, ids=_IDS)
def test_what_predicts_is_the_network_and_nothing_else(name: str, options: dict) -> None:
    algorithm = build(name, Adam(), options)
    state, _ = step(algorithm, started(algorithm), batch(algorithm))
    kept = algorithm.inference(state)
    expected = algorithm.model.state_dict()
    assert {n: t.shape for n, t in kept.items()} == {n: t.shape for n, t in expected.items()}


@pytest.mark.parametrize(("name", "options"), CHOICES, ids=_IDS)
def test_another_seed_starts_the_parts_of_training_otherwise(name: str, options: dict) -> None:
    algorithm = build(name, Adam(), options)
    first, again, other = (algorithm.init(seed).params for seed in (1, 1, 2))
    parts = [n for n in first if "/" in n and first[n].dim() > 1]
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in parts)


@pytest.mark.parametrize(("name", "options"), _STACKED, ids=_STACKED_IDS)
@pytest.mark.parametrize("backbone", ["cnn", "transformer"])
def test_stacked_steps_equal_single_steps(name: str, options: dict, backbone: str) -> None:
    # Not Adam: it blows up the rounding of gradients that are zero, those of a bias before a normalisation.
    algorithms = [build(name, Sgd(momentum=0.9), options, backbone=backbone, seed=seed) for seed in (0, 1)]
    states = [started(algorithm, seed) for seed, algorithm in enumerate(algorithms)]
    hypers = [hyper(algorithms[0], lr=rate) for rate in (0.01, 0.02)]
    batches, keys = [batch(algorithms[0], seed=seed) for seed in (5, 6)], torch.tensor([7, 8])
    stacked_state = State(*(_stack(*parts) for parts in zip(*states, strict=True)))
    x, y, numbers = (torch.stack([getattr(b, field) for b in batches]) for field in ("x", "y", "number"))

    def run(state: State, x: Tensor, y: Tensor, numbers: Tensor, hypers: dict[str, Tensor], rng: Tensor):
        return algorithms[0].step(state, Batch(x, y, None, numbers), hypers, rng)

    after, metrics = vmap(run)(stacked_state, x, y, numbers, _stack(*hypers), keys)
    for number in range(2):
        single, scalars = algorithms[number].step(
            states[number], batches[number], hypers[number], keys[number]
        )
        mine = State(*({n: t[number] for n, t in part.items()} for part in after))
        for value, expected in ((mine.params, single.params), (mine.buffers, single.buffers)):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        for label, value in scalars.items():
            torch.testing.assert_close(metrics[label][number], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["erm", "mixup", "coral"])
def test_a_traced_step_equals_the_step(name: str) -> None:
    """What the plan compiler needs of a step (the algorithms whose client steps federations use)."""
    algorithm = build(name, Sgd(momentum=0.9))
    state, given = algorithm.init(), hyper(algorithm)

    def run(state: State, one: Batch, rng: Tensor):
        return algorithm.step(state, one, given, rng)

    weighted = Batch(*batch(algorithm)[:2], torch.ones(3, 6))
    traced = make_fx(run)(state, weighted, torch.tensor(1))
    other = Batch(*batch(algorithm, seed=9)[:2], torch.ones(3, 6))
    after, metrics = traced(state, other, torch.tensor(2))
    expected, expected_metrics = run(state, other, torch.tensor(2))
    _assert_states_equal(after, expected)
    torch.testing.assert_close(metrics, expected_metrics, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *("erm", "coral", "dann", "mmd", "vrex", "group-dro", "fishr", "lag", "affar"),
        *("rsc", "and-mask", "fish", "mldg", "erm-plus-plus"),
    ],
)
def test_padding_does_not_matter(name: str) -> None:
    algorithm = build(name, Sgd())
    short = batch(algorithm, windows=4)
    padded = Batch(
        torch.cat([short.x, torch.full((3, 2, 3, 40), 9.0)], 1),
        torch.cat([short.y, torch.zeros(3, 2, dtype=torch.int64)], 1),
        torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]).expand(3, 6),
    )
    state = algorithm.init()
    ours, metrics = step(algorithm, state, padded)
    plain, expected = step(algorithm, state, short)
    _assert_states_equal(ours, plain, 1e-4)
    torch.testing.assert_close(metrics, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["erm", "coral", "mmd", "vrex", "group-dro", "fishr", "lag", "and-mask"])
def test_the_order_of_the_domains_does_not_change_the_loss(name: str) -> None:
    algorithm = build(name, Sgd())
    state, given = algorithm.init(), batch(algorithm)
    order = torch.tensor([2, 0, 1])
    turned = Batch(given.x[order], given.y[order])
    first, second = step(algorithm, state, given), step(algorithm, state, turned)
    torch.testing.assert_close(first[1], second[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first[0].params, second[0].params, rtol=1e-4, atol=1e-5)


def test_tape_and_transformed_gradients_are_equal() -> None:
    """The fast way to differentiate against the reference that torch.func transforms, one objective and several."""
    state = State({"w": torch.tensor([2.0, 3.0]), "u": torch.tensor(4.0)}, {"b": torch.tensor(1.0)}, {}, {})

    def both(params: dict[str, Tensor], buffers: dict[str, Tensor]):
        first, second = params["w"].square().sum() * params["u"], buffers["b"] * params["w"].prod()
        return torch.stack([first, second]), ({"m": first}, {"b": buffers["b"] + 1.0})

    def one(params: dict[str, Tensor], buffers: dict[str, Tensor]):
        values, rest = both(params, buffers)
        return values[0], rest

    stacked = State(*({n: t[None] for n, t in part.items()} for part in state))

    def apart(params: dict[str, Tensor], buffers: dict[str, Tensor]):
        values, rest = both(params, buffers)
        return tuple(values.unbind()), rest

    for function, objective in ((gradient, one), (gradients, both), (gradients, apart)):
        plain = function(objective, state, ["w"])
        through = vmap(lambda s, f=function, o=objective: f(o, s, ["w"]))(stacked)
        flat = torch.utils._pytree.tree_map(lambda t: t[0], through)
        torch.testing.assert_close(plain, flat, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        gradients(both, state)[0]["w"], torch.tensor([[16.0, 24.0], [3.0, 2.0]]), rtol=0.0, atol=0.0
    )


def test_only_the_trained_parameters_move() -> None:
    def objective(params: dict[str, Tensor], buffers: dict[str, Tensor]):
        return params["w"].square().sum() + params["v"].sum(), ({}, buffers)

    state = State({"w": torch.tensor([2.0]), "v": torch.tensor([5.0])}, {}, {}, {})
    with torch.no_grad():  # a step works where gradients are switched off
        after, metrics = descend(objective, state, Sgd(), torch.tensor(0.25), trained=["w"])
    assert {n: p.tolist() for n, p in after.params.items()} == {"w": [1.0], "v": [5.0]}
    assert float(metrics["loss"]) == 9.0


def test_registry_names_itself_and_says_what_it_knows() -> None:
    assert all(kind.info.name == name for name, kind in ALGORITHMS.items())
    with pytest.raises(ConfigError, match="unknown algorithm 'emr'; known: erm, mixup, coral"):
        build_algorithm("emr", model(), Sgd())
    with pytest.raises(ConfigError, match=r"pairing = batch \| domain"):
        build_algorithm("mixup", model(), Sgd(), {"pairing": "pairs"})
    with pytest.raises(ConfigError, match="its options: none"):
        build_algorithm("erm", model(), Sgd(), {"pairing": "batch"})
    assert build("erm", Sgd()).domains == DOMAINS
