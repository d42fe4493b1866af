"""SOT: the transport against the published iteration, what is carried where, and that the network is ERM's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_cases import batch, build, data, hyper, step
from wearfleet_cloud.algorithms import Algorithm
from wearfleet_cloud.algorithms.sot import (
    Sot,
    carry_labels,
    label_centres,
    statistics,
    substructures,
    transport,
)
from wearfleet_cloud.training.optimisers import Sgd

_HYPER = {**Sot.info.hyper, "clusters": 12.0}


def _blobs(seed: int, spread: float = 0.3, windows: int = 60) -> tuple:
    """Features (n, 4) and classes of three classes with two blobs each."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(1).uniform(-4.0, 4.0, (6, 4))
    blob = np.arange(6 * windows) % 6
    return centres[blob] + spread * generator.standard_normal((len(blob), 4)), blob // 2


def _published(cost, classes, a, b, epsilon: float, eta: float, outer: int, inner: int) -> np.ndarray:
    """Step 5 of specs/ood.md 3.7 entry by entry, with scalings in place of logarithms."""
    weight, plan = np.zeros_like(cost), np.zeros_like(cost)
    for _ in range(outer):
        kernel = np.exp(-(cost + eta * weight) / epsilon)
        right = np.ones(len(b))
        for _ in range(inner):
            left = a / (kernel @ right)
            right = b / (kernel.T @ left)
        plan = left[:, None] * kernel * right
        for i in range(len(a)):
            for j in range(len(b)):
                total = sum(plan[k, j] for k in range(len(a)) if classes[k] == classes[i])
                weight[i, j] = 0.5 * (total + 1e-3) ** -0.5
    return plan


def test_the_plan_is_that_of_the_published_iteration() -> None:
    generator = np.random.default_rng(3)
    known, target = generator.standard_normal((7, 3)), generator.standard_normal((5, 3))
    classes, share = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([0.1, 0.3, 0.2, 0.25, 0.15])
    given = {"epsilon": 0.5, "eta": 1.0, "relaxation": 3.0}
    cost = np.array([[sum((p - q) ** 2) for q in target] for p in known])
    cost /= np.median(cost)
    a = np.zeros(7)
    for j in range(5):
        column = np.exp(-cost[:, j] / 3.0)
        a += share[j] * column / column.sum()
    plan = transport(known, classes, target, share, given)
    np.testing.assert_allclose(
        plan, _published(cost, classes, a, share, 0.5, 1.0, 10, 200), rtol=1e-9, atol=1e-12
    )
    # T13; 200 iterations at this regularisation have converged
    np.testing.assert_allclose(plan.sum(axis=1), a, atol=1e-6)
    np.testing.assert_allclose(plan.sum(axis=0), share, atol=1e-6)


def test_centres_carried_to_themselves_keep_their_classes() -> None:
    """T13, the identity task: every centre is nearest to itself."""
    x, y = _blobs(2)
    centres, classes = substructures(x, y)
    share = np.full(len(centres), 1.0 / len(centres))
    np.testing.assert_array_equal(label_centres(centres, classes, centres, share, _HYPER), classes)


def test_windows_of_the_source_itself_get_the_classes_of_the_nearest_centres() -> None:
    x, y = _blobs(2)
    centres, classes = substructures(x, y)
    nearest = classes[((x[:, None] - centres) ** 2).sum(2).argmin(1)]
    np.testing.assert_array_equal(carry_labels(x, y, x, _HYPER, strict=False), nearest)


def test_a_target_that_is_measured_in_other_units_gets_the_same_classes() -> None:
    (x, y), (other, truth) = _blobs(2), _blobs(5)
    found = carry_labels(x, y, other, _HYPER, strict=False)
    assert (found == truth).mean() > 0.98
    moved = carry_labels(
        x,
        y,
        other * np.array([9.8, 0.1, 57.0, 1.0]) + np.array([300.0, -800.0, 0.0, 100.0]),
        _HYPER,
        strict=False,
    )
    np.testing.assert_array_equal(moved, found)


def test_strict_mode_depends_on_the_sign_of_the_largest_value() -> None:
    """P30: a column that ends just above 0 in the source and just below in the target is turned around."""
    (x, y), (other, truth) = _blobs(2), _blobs(5)
    x, other = x - x.max(axis=0) + 0.05, other - other.max(axis=0) - 0.05
    right = [(carry_labels(x, y, other, _HYPER, strict=strict) == truth).mean() for strict in (False, True)]
    assert right[0] > 0.98
    assert right[1] < 0.7


def test_every_class_has_the_centres_of_its_blobs() -> None:
    x, y = _blobs(2, spread=0.05)
    centres, classes = substructures(x, y)
    blobs = np.random.default_rng(1).uniform(-4.0, 4.0, (6, 4))
    for blob, middle in enumerate(blobs):
        own = centres[classes == blob // 2]
        assert np.sqrt(((own - middle) ** 2).sum(1)).min() < 0.1
    assert len(centres) < 20


def test_a_class_of_one_window_is_its_own_centre() -> None:
    x, y = np.array([[0.0, 1.0], [2.0, 3.0], [2.1, 3.0]]), np.array([1, 0, 0])
    centres, classes = substructures(x, y)
    assert classes[-1] == 1
    np.testing.assert_allclose(centres[classes == 1], [[0.0, 1.0]], atol=1e-12)


def test_statistics_of_a_wave() -> None:
    """2 + 3 sin with 10 periods in 64 samples: all power in the second of four bands of 8 frequencies."""
    time = torch.arange(64, dtype=torch.float64) / 64.0
    wave = 2.0 + 3.0 * torch.sin(2.0 * torch.pi * 10.0 * time)
    found = statistics(torch.stack([wave, torch.full_like(wave, 5.0)])[None])[0]
    expected = [
        2.0,
        (9.0 / 2.0) ** 0.5,
        float(wave.min()),
        float(wave.max()),
        4.0 + 9.0 / 2.0,
        0.0,
        1.0,
        0.0,
        0.0,
    ]
    torch.testing.assert_close(found[:9], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[9:], torch.tensor([5.0, 0.0, 5.0, 5.0, 25.0] + [0.0] * 4).double())


@pytest.mark.parametrize("features", ["statistics", "network"])
def test_the_target_is_labelled_and_the_network_left_alone(features: str) -> None:
    sot = build("sot", Sgd(), {"features": features})
    source, state = data(40), sot.init()
    for number in range(30):
        state, _ = step(sot, state, batch(sot, seed=number), number)
    kept = sot.inference(state)
    before = {n: t.clone() for n, t in kept.items()}
    target = data(40, domains=1, seed=8)
    found = sot.transduce(kept, source, target.windows(slice(None)), hyper(sot, clusters=12))
    assert (found.shape, found.dtype) == ((40,), torch.int64)
    assert set(found.tolist()) <= {0, 1, 2, 3}
    assert torch.equal(
        found, sot.transduce(kept, source, target.windows(slice(None)), hyper(sot, clusters=12))
    )
    torch.testing.assert_close(kept, before, rtol=0.0, atol=0.0)
    assert sot.model.training
    assert float((found == target.y).float().mean()) > 0.3  # four classes; most of the noise is not theirs


def test_the_network_is_that_of_erm_and_others_predict_by_it() -> None:
    sot, erm = build("sot", Sgd()), build("erm", Sgd())
    given = batch(erm)
    ours, plain = step(sot, sot.init(), given)[0], step(erm, erm.init(), given)[0]
    torch.testing.assert_close(tuple(ours), tuple(plain), rtol=0.0, atol=0.0)
    assert Algorithm.transduce(erm, erm.inference(plain), data(), given.x[0], hyper(erm)) is None
    assert Sot.info.needs == ("unlabelled target data",)
    assert Sot.info.alone
