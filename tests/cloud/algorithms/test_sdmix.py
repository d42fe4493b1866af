"""SDMix: radii and shares by loops, the whole loss written out, and when it looks at all windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_cases import CLASSES, DOMAINS, batch, build, data, hyper, started, step
from torch import Tensor
from torch.func import vmap
from wearfleet_cloud.algorithms import State
from wearfleet_cloud.algorithms.passes import embed
from wearfleet_cloud.algorithms.sdmix import class_radii, semantic_shares
from wearfleet_cloud.kernels.margin import large_margin_reference
from wearfleet_cloud.training.optimisers import Sgd
from wearfleet_models import randomness


def _distance(row: np.ndarray, centre: np.ndarray, name: str) -> float:
    if name == "cosine":
        return 1.0 - row @ centre / np.linalg.norm(row) / np.linalg.norm(centre)
    return float(np.linalg.norm(row - centre, ord={"euclidean": 2, "manhattan": 1}[name]))


def _rows(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    groups = torch.randint(0, 6, (count,), generator=generator)
    groups[groups == 3] = 2  # a group without members
    return 1.0 + torch.randn(count, 5, generator=generator, dtype=torch.float64), groups


@pytest.mark.parametrize("distance", ["euclidean", "manhattan", "cosine"])
@pytest.mark.parametrize("radius", ["largest", "mean"])
def test_radii_are_those_of_loops_over_windows(distance: str, radius: str) -> None:
    z, groups = _rows()
    ours = class_radii(z, groups, 6, distance=distance, radius=radius)
    rows, label = z.numpy(), groups.numpy()
    expected = np.zeros(6)
    for group in set(label.tolist()):
        centre = rows[label == group].mean(axis=0)
        far = [_distance(row, centre, distance) for row in rows[label == group]]
        expected[group] = max(far) if radius == "largest" else np.mean(far)
    assert expected[3] == 0.0
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-15)


def test_strict_mean_radius_is_the_largest_of_the_means_within_batches() -> None:
    """P10: it depends on how windows fall into batches, and exceeds the mean over all of them."""
    z, groups = _rows(150)
    batches = torch.arange(150) // 64
    ours = class_radii(z, groups, 6, distance="euclidean", radius="mean", batches=batches)
    rows, label, part = z.numpy(), groups.numpy(), batches.numpy()
    expected = np.zeros(6)
    for group in set(label.tolist()):
        centre = rows[label == group].mean(axis=0)
        for number in range(3):
            here = rows[(label == group) & (part == number)]
            if len(here):
                far = np.mean([_distance(row, centre, "euclidean") for row in here])
                expected[group] = max(expected[group], far)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=0.0)
    whole = class_radii(z, groups, 6, distance="euclidean", radius="mean")
    assert bool((ours >= whole).all())
    assert bool((ours > whole * 1.01).any())


@pytest.mark.parametrize(
    ("mode", "radius"), [("corrected", "largest"), ("corrected", "mean"), ("strict", "mean")]
)
def test_refresh_measures_all_training_windows_in_evaluation_mode(mode: str, radius: str) -> None:
    algorithm = build("sdmix", Sgd(), {"mode": mode, "radius": radius})
    windows, state = data(), algorithm.init()
    assert float(state.extras["radius"].abs().sum()) == 0.0
    after = algorithm.refresh(state, windows, hyper(algorithm), torch.tensor(3))
    assert algorithm.model.training
    network = algorithm.model.eval()
    with torch.no_grad():
        z = network.features(windows.x.transpose(1, 2)).numpy()
    for domain in range(DOMAINS):
        for label in range(CLASSES):
            own = z[(windows.domain.numpy() == domain) & (windows.y.numpy() == label)]
            far = np.linalg.norm(own - own.mean(axis=0), axis=1)
            # 24 windows a domain: one batch of the published code, whose largest mean is then the mean
            expected = far.max() if radius == "largest" else far.mean()
            assert float(after.extras["radius"][domain, label]) == pytest.approx(expected, rel=1e-4)


def test_shares_lean_to_the_class_with_more_room_and_fall_back_to_lam() -> None:
    lam = torch.tensor([0.25, 1.0])
    first, second = (
        torch.tensor([[3.0, 0.0, 0.0], [2.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 0.0, 5.0], [9.0, 0.0, 1.0]]),
    )
    shares = semantic_shares(lam, first, second)
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.25, 0.0], [1.0, 1.0, 1.0]]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("mode", ["corrected", "strict"])
def test_the_loss_is_the_published_sum_over_pairs_of_domains(mode: str) -> None:
    algorithm = build("sdmix", Sgd(), {"mode": mode, "top_k": "2", "distance": "manhattan"})
    state, given, key = started(algorithm), batch(algorithm), torch.tensor(4)
    _, metrics = algorithm.step(state, given, hyper(algorithm, mixup_alpha=1.0, gamma=2.0), key)
    circle = randomness.permutation(key, 1_000, DOMAINS).tolist()
    radii, buffers, total = state.extras["radius"].double(), state.buffers, 0.0
    weight, bias = state.params["head.weight"].double(), state.params["head.bias"].double()
    for pair in range(DOMAINS):
        a, b = circle[pair], circle[(pair + 1) % DOMAINS]
        lam = randomness.beta(randomness.derive(key, pair), 1_001, torch.tensor(1.0))
        x = lam * given.x[a] + (1.0 - lam) * given.x[b]
        z, buffers = embed(algorithm.model, state.params, buffers, x, None, key)
        labels, floor = torch.stack([given.y[a], given.y[b]], 1), 1e-3 if mode == "corrected" else 0.0
        losses = large_margin_reference(z.detach().double(), weight, bias, labels, 2.0, 2, "mean", floor)
        for row in range(given.y.shape[1]):
            one = float(lam) * float(radii[a, given.y[a, row]])
            two = (1.0 - float(lam)) * float(radii[b, given.y[b, row]])
            share = one / (one + two)
            total += share * float(losses[row, 0]) + (1.0 - share) * float(losses[row, 1])
    # float32 embeddings of a batch-normalised network: a thousand roundings of 6e-8 at most
    assert float(metrics["loss"]) == pytest.approx(total / DOMAINS / given.y.shape[1], rel=1e-4, abs=1e-5)


def test_without_mixing_equal_domains_cost_the_mean_margin_of_the_windows() -> None:
    algorithm = build("sdmix", Sgd())
    algorithm.model.eval()
    state, one = started(algorithm), batch(algorithm)
    given = one._replace(x=one.x[:1].expand(DOMAINS, -1, -1, -1), y=one.y[:1].expand(DOMAINS, -1))
    _, metrics = step(algorithm, state, given, 1, mixup_alpha=1e-4)
    z, _ = embed(algorithm.model, state.params, state.buffers, one.x[0], None, None)
    weight, bias = state.params["head.weight"].double(), state.params["head.bias"].double()
    losses = large_margin_reference(z.double(), weight, bias, one.y[0][:, None], 100.0, 3, "mean", 1e-3)
    torch.testing.assert_close(metrics["loss"].double(), losses.mean(), rtol=1e-4, atol=1e-5)


def test_it_looks_at_all_windows_before_every_so_many_passes() -> None:
    every, fifth = build("sdmix", Sgd()), build("sdmix", Sgd(), {"radius_passes": "5"})
    assert [n for n in range(9) if every.refresh_at(n, 4)] == [0, 4, 8]
    assert [n for n in range(41) if fifth.refresh_at(n, 4)] == [0, 20, 40]


def test_stacked_radii_equal_single_ones() -> None:
    algorithms, windows = [build("sdmix", Sgd(), seed=seed) for seed in (0, 1)], data()
    states = [algorithm.init() for algorithm in algorithms]
    parts = zip(*states, strict=True)
    stacked = State(*({n: torch.stack([part[n] for part in pair]) for n in pair[0]} for pair in parts))
    given, key = hyper(algorithms[0]), torch.tensor(1)
    after = vmap(lambda state: algorithms[0].refresh(state, windows, given, key))(stacked)
    for number in range(2):
        single = algorithms[number].refresh(states[number], windows, given, key)
        torch.testing.assert_close(
            after.extras["radius"][number], single.extras["radius"], rtol=1e-4, atol=1e-5
        )
