"""DIVERSIFY: which stage moves what and when, each stage's loss written out, and the assignment to latent domains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import CLASSES, DOMAINS, batch, build, data, hyper, started
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.func import functional_call, vmap
from wearfleet_cloud.algorithms import Algorithm, Batch, State, build_algorithm
from wearfleet_cloud.algorithms.diversify import Diversify, relabelled
from wearfleet_cloud.training.loop import advance
from wearfleet_cloud.training.optimisers import Adam, Sgd
from wearfleet_protos.errors import ConfigError

_STAGES = ("fine_step", "latent_step", "step")
_MOVES = {
    "fine_step": ("backbone.", "fine_neck/", "fine_head/"),
    "latent_step": ("latent_neck/", "latent_head/", "latent_classes/"),
    "step": ("neck.", "head.", "domains/"),
}


def _build(**options: str) -> Diversify:
    algorithm = build("diversify", Sgd(momentum=0.9), {"latent_domains": "3", "local_passes": "1", **options})
    assert isinstance(algorithm, Diversify)
    return algorithm


def _labelled(algorithm: Algorithm, seed: int = 0) -> State:
    """A state with latent domains of all kinds."""
    state = started(algorithm, seed)
    return state._replace(extras={"latent_domain": torch.arange(72) % 3})


def _stacked(states: list[State]) -> State:
    pairs = zip(*states, strict=True)
    return State(*({n: torch.stack([part[n] for part in parts]) for n in parts[0]} for parts in pairs))


def _module(algorithm: Algorithm, name: str, tensors: dict[str, Tensor], *args: Tensor) -> Tensor:
    own = {n.removeprefix(f"{name}/"): t.clone() for n, t in tensors.items() if n.startswith(f"{name}/")}
    return functional_call(algorithm.parts[name], own, args)


def _backbone(algorithm: Algorithm, x: Tensor) -> Tensor:
    model = algorithm.model
    own = {n: b.clone() for n, b in model.backbone.named_buffers()}
    return functional_call(model.backbone, own, (model.standardise(x), None, None))


@pytest.mark.parametrize("stage", _STAGES)
def test_each_stage_moves_its_own_parameters_and_only_the_first_the_backbone(stage: str) -> None:
    algorithm = _build()
    state, given = _labelled(algorithm), batch(algorithm)
    after, _ = getattr(algorithm, stage)(state, given, hyper(algorithm), torch.tensor(1))
    for name, before in state.params.items():
        moved = not torch.equal(before, after.params[name])
        own = name.startswith(_MOVES[stage])
        assert moved == own or (own and name.endswith("bias"))  # a bias before a normalisation has no slope
    moments = {n for n, slot in after.slots.items() if not torch.equal(slot, state.slots[n])}
    assert moments
    assert {n.partition(":")[0] for n in moments} == {
        {"fine_step": "fine", "latent_step": "latent", "step": "invariant"}[stage]
    }
    statistics = "backbone.norm1.running_mean"
    assert not torch.equal(after.buffers[statistics], state.buffers[statistics])


def test_rounds_of_three_stages_with_the_assignment_before_the_third() -> None:
    algorithm = _build(local_passes="3")
    names = [algorithm.step_at(number, 4).__name__ for number in range(72)]
    assert names == 2 * (12 * ["fine_step"] + 12 * ["latent_step"] + 12 * ["step"])
    assert [n for n in range(108) if algorithm.refresh_at(n, 4)] == [0, 24, 60, 96]


@pytest.mark.parametrize(("latent", "windows"), [("2", 64), ("5", 160), ("10", 160), ("20", 320)])
def test_batches_are_the_published_ones(latent: str, windows: int) -> None:
    assert _build(latent_domains=latent).shape(32) == (1, windows)


def test_fine_grained_loss_is_that_of_classes_times_latent_domains() -> None:
    algorithm = _build()
    state, given = _labelled(algorithm), batch(algorithm)
    _, metrics = algorithm.fine_step(state, given, hyper(algorithm), torch.tensor(1))
    tensors, x, y = {**state.params, **state.buffers}, given.x[0], given.y[0]
    embedding = _module(algorithm, "fine_neck", tensors, _backbone(algorithm, x))
    logits = _module(algorithm, "fine_head", tensors, embedding)
    assert logits.shape[1] == 3 * CLASSES
    expected = F.cross_entropy(logits, (given.number[0] % 3) * CLASSES + y)
    torch.testing.assert_close(metrics["loss"], expected.detach(), rtol=1e-5, atol=1e-6)


def test_latent_loss_is_both_cross_entropies_and_the_entropy() -> None:
    algorithm = _build()
    state, given = _labelled(algorithm), batch(algorithm)
    _, metrics = algorithm.latent_step(state, given, hyper(algorithm, entropy=0.5), torch.tensor(1))
    tensors = {**state.params, **state.buffers}
    u = _module(algorithm, "latent_neck", tensors, _backbone(algorithm, given.x[0]))
    classes = _module(algorithm, "latent_classes", tensors, u)
    logits = _module(algorithm, "latent_head", tensors, u)
    p = logits.detach().softmax(1)
    entropy = sum(-float(q) * np.log(float(q) + 1e-5) for q in p.flatten()) / len(p)
    expected = (
        F.cross_entropy(classes, given.y[0]).item() + F.cross_entropy(logits, given.number[0] % 3).item()
    )
    assert float(metrics["loss"]) == pytest.approx(expected + 0.5 * entropy, rel=1e-5)


def test_invariant_stage_without_reversal_is_erm_of_bottleneck_and_head() -> None:
    algorithm = _build()
    erm = build_algorithm("erm", algorithm.model, Sgd(momentum=0.9))
    state, given = _labelled(algorithm), batch(algorithm)
    expected, plain = erm.step(erm.init(), given, hyper(algorithm), torch.tensor(1))
    ours, metrics = algorithm.step(state, given, hyper(algorithm, reversal=0.0), torch.tensor(1))
    torch.testing.assert_close(metrics["risk"], plain["loss"], rtol=1e-5, atol=1e-6)
    for name, value in expected.params.items():
        wanted = state.params[name] if name.startswith("backbone.") else value
        torch.testing.assert_close(ours.params[name], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["strict", "corrected"])
def test_assignment_is_that_of_the_published_arithmetic(mode: str) -> None:
    """In float64, with scipy's cosine distance; no latent domain is empty here. The constant 1 matters for 6."""
    generator = torch.Generator().manual_seed(5)
    centre = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    own = torch.arange(60) % 4
    u = centre[own] + 0.7 * torch.randn(60, 6, generator=generator, dtype=torch.float64)
    logits = 2.0 * F.one_hot(own, 4) + torch.randn(60, 4, generator=generator, dtype=torch.float64)
    rows = np.hstack([u.numpy(), np.ones((60, 1))])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    share = logits.softmax(1).numpy()
    for _ in range(2):
        centres = share.T @ rows / (1e-8 + share.sum(axis=0)[:, None])
        label = cdist(rows, centres, "cosine").argmin(axis=1)
        share = np.eye(4)[label]
    assert set(label) == {0, 1, 2, 3}
    np.testing.assert_array_equal(relabelled(u, logits, mode=mode).numpy(), label)


def test_an_empty_latent_domain_stays_empty_and_does_not_take_all_windows() -> None:
    """P4. The soft centre of latent domain 1 is that of 0 and of 2 mixed, nearest to no window."""
    u = torch.tensor([[5.0, 0.0], [4.0, 0.3], [0.0, 5.0], [0.3, 4.0]])
    logits = torch.tensor([[6.0, 2.0, 0.0], [6.0, 2.0, 0.0], [0.0, 2.0, 6.0], [0.0, 2.0, 6.0]])
    assert relabelled(u, logits, mode="corrected").tolist() == [0, 0, 2, 2]
    assert relabelled(u, logits, mode="strict").tolist() == [1, 1, 1, 1]


def test_assignment_looks_at_all_windows_in_evaluation_mode() -> None:
    algorithm, windows = _build(), data()
    state = _labelled(algorithm)
    after = algorithm.refresh(state, windows, hyper(algorithm), torch.tensor(1))
    assert algorithm.model.training
    assert algorithm.parts["latent_neck"].training
    algorithm.model.eval()
    algorithm.parts["latent_neck"].eval()
    tensors = {**state.params, **state.buffers}
    u = _module(algorithm, "latent_neck", tensors, _backbone(algorithm, windows.x.transpose(1, 2)))
    expected = relabelled(u, _module(algorithm, "latent_head", tensors, u), mode="corrected")
    assert torch.equal(after.extras["latent_domain"], expected)


def test_a_round_of_the_training_loop_gives_every_window_a_latent_domain() -> None:
    """In pieces of 7 steps, as in one: labels and optimisers are part of the state."""
    algorithm, windows = build("diversify", Adam(), {"latent_domains": "3", "local_passes": "1"}), data()
    ends = []
    for piece in (18, 7):
        state = algorithm.init()
        for first in range(0, 18, piece):
            steps = range(first, min(first + piece, 18))
            state, _ = advance(
                algorithm,
                state,
                windows,
                hyper(algorithm, lr=0.01),
                key=torch.tensor(2),
                steps=steps,
                batch=4,
                on_step=lambda _: None,
            )
        ends.append(state)
    torch.testing.assert_close(tuple(ends[0]), tuple(ends[1]), rtol=0.0, atol=0.0)
    assert len(ends[0].extras["latent_domain"].unique()) > 1


@pytest.mark.parametrize("stage", ["fine_step", "latent_step"])
def test_stacked_stages_equal_single_ones(stage: str) -> None:
    algorithms = [build("diversify", Sgd(), {"latent_domains": "3"}, seed=seed) for seed in (0, 1)]
    states = [_labelled(algorithm, seed) for seed, algorithm in enumerate(algorithms)]
    given, keys, rates = batch(algorithms[0]), torch.tensor([7, 8]), hyper(algorithms[0])
    stacked = _stacked(states)

    def run(state: State, rng: Tensor):
        return getattr(algorithms[0], stage)(state, given, rates, rng)

    after, metrics = vmap(run)(stacked, keys)
    for number in range(2):
        single, scalars = getattr(algorithms[number], stage)(states[number], given, rates, keys[number])
        for name, value in single.params.items():
            torch.testing.assert_close(after.params[name][number], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(metrics["loss"][number], scalars["loss"], rtol=1e-4, atol=1e-5)


def test_stacked_assignment_equals_the_single_one() -> None:
    algorithms = [build("diversify", Sgd(), {"latent_domains": "3"}, seed=seed) for seed in (0, 1)]
    states, windows = [_labelled(a, seed) for seed, a in enumerate(algorithms)], data()
    stacked = _stacked(states)
    rates, key = hyper(algorithms[0]), torch.tensor(1)
    after = vmap(lambda state: algorithms[0].refresh(state, windows, rates, key))(stacked)
    for number in range(2):
        single = algorithms[number].refresh(states[number], windows, rates, key)
        assert torch.equal(after.extras["latent_domain"][number], single.extras["latent_domain"])


def test_batches_without_the_numbers_of_their_windows_are_refused() -> None:
    algorithm = _build()
    given = batch(algorithm)
    with pytest.raises(ConfigError, match=r"Batch\.number"):
        algorithm.step(_labelled(algorithm), Batch(given.x, given.y), hyper(algorithm), torch.tensor(1))
    assert algorithm.domains == DOMAINS
