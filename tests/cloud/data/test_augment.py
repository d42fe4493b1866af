"""Augmentation: every transform against a slow one of NumPy and scipy, window by window, and the laws of its draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.func import vmap
from wearfleet_cloud.data.augment import TRANSFORMS, Draws, apply_transforms, augment, draw, jitter
from wearfleet_protos.errors import ShapeError

_NOISE = 0.05


def _windows(count: int, channels: int, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 1.0 + torch.randn(count, channels, samples, generator=generator, dtype=torch.float64).cumsum(2)


def _in_float64(draws: Draws) -> Draws:
    return Draws(*(t.double() if t.is_floating_point() else t for t in draws))


def _curve(knots: np.ndarray, samples: int) -> np.ndarray:
    return CubicSpline(np.linspace(0, samples - 1, 6), 1.0 + 0.2 * knots)(np.arange(samples))


def _jitter(x: np.ndarray, draws: dict[str, np.ndarray]) -> np.ndarray:
    return x + _NOISE * draws["noise"]


def _scaling(x: np.ndarray, draws: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([(1.0 + 0.1 * knots[0]) * axis for axis, knots in zip(x, draws["knots"], strict=True)])


def _magnitude_warp(x: np.ndarray, draws: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([_curve(k, len(axis)) * axis for axis, k in zip(x, draws["knots"], strict=True)])


def _time_warp(x: np.ndarray, draws: dict[str, np.ndarray]) -> np.ndarray:
    axes = []
    for axis, knots in zip(x, draws["knots"], strict=True):
        elapsed = np.cumsum(_curve(knots, len(axis)))
        axes.append(np.interp(np.arange(len(axis)), elapsed * (len(axis) - 1) / elapsed[-1], axis))
    return np.stack(axes)


def _rotation(x: np.ndarray, draws: dict[str, np.ndarray]) -> np.ndarray:
    out = x.copy()
    for triad in range(len(x) // 3):
        axis, angle = 2.0 * draws["turn"][triad, :3] - 1.0, math.pi * (2.0 * draws["turn"][triad, 3] - 1.0)
        turn = Rotation.from_rotvec(angle * axis / np.linalg.norm(axis))
        out[3 * triad : 3 * triad + 3] = turn.apply(x[3 * triad : 3 * triad + 3].T).T
    return out


def _permutation(x: np.ndarray, draws: dict[str, np.ndarray]) -> np.ndarray:
    axes = []
    for channel, axis in enumerate(x):
        segments = np.split(axis, np.cumsum(draws["lengths"][channel // 3])[:-1])
        axes.append(np.concatenate([segments[number] for number in draws["order"][channel // 3]]))
    return np.stack(axes)


def _random_sampling(x: np.ndarray, draws: dict[str, np.ndarray]) -> np.ndarray:
    times = np.arange(x.shape[1])
    return np.stack([np.interp(times, kept, axis[kept]) for axis, kept in zip(x, draws["kept"], strict=True)])


_SLOW = (_jitter, _scaling, _magnitude_warp, _time_warp, _rotation, _permutation, _random_sampling)


@pytest.mark.parametrize(("channels", "samples"), [(6, 128), (9, 125), (3, 50), (8, 44), (1, 8), (2, 31)])
def test_every_transform_is_the_slow_one(channels: int, samples: int) -> None:
    count = 3 * len(TRANSFORMS)
    x, transform = _windows(count, channels, samples), torch.arange(count) % len(TRANSFORMS)
    draws = _in_float64(draw(torch.tensor(5), count, channels, samples))
    noise = torch.full((channels,), _NOISE, dtype=torch.float64)
    ours = apply_transforms(x, transform, draws, noise).numpy()
    for number in range(count):
        given = {name: t[number].numpy() for name, t in draws._asdict().items()}
        expected = _SLOW[number % len(TRANSFORMS)](x[number].numpy(), given)
        # float64; a time of the warp is off by 1e-13 at most, between samples that differ by a few units
        np.testing.assert_allclose(ours[number], expected, rtol=1e-10, atol=1e-10)
        assert not np.allclose(expected, x[number].numpy()) or channels < 3


def test_float32_is_close_to_float64() -> None:
    x, transform = _windows(70, 6, 128), torch.arange(70) % len(TRANSFORMS)
    draws, noise = draw(torch.tensor(5), 70, 6, 128), torch.full((6,), _NOISE)
    exact = apply_transforms(x, transform, _in_float64(draws), noise.double())
    ours = apply_transforms(x.float(), transform, draws, noise)
    # times of the warp up to 127 carry 127 * 128 roundings of 6e-8 at worst, about 1e-3 of a sample, between samples
    # that differ by 4 at most
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=4e-3)


def test_it_is_pure_in_its_key_and_leaves_the_windows_alone() -> None:
    x, transform, noise = _windows(14, 6, 64).float(), torch.arange(14) % 7, torch.full((6,), _NOISE)
    before = x.clone()
    first, again, other = (augment(x, transform, torch.tensor(key), noise) for key in (1, 1, 2))
    assert torch.equal(x, before)
    assert torch.equal(first, again)
    assert bool((first != other).flatten(1).any(dim=1).all())
    keys = torch.tensor([1, 2])
    stacked = vmap(lambda key: augment(x, transform, key, noise))(keys)
    torch.testing.assert_close(stacked, torch.stack([first, other]), rtol=1e-5, atol=1e-5)


def test_jitter_alone_is_the_first_transform() -> None:
    x, noise = _windows(4, 6, 64).float(), torch.linspace(0.1, 0.6, 6)
    key = torch.tensor(9)
    ours = jitter(x, key, noise)
    torch.testing.assert_close(augment(x, torch.zeros(4).long(), key, noise), ours, rtol=1e-6, atol=1e-6)
    spread = (jitter(torch.zeros(200, 6, 64), key, noise)).std(dim=(0, 2))
    # 12 800 numbers: their standard deviation is within 1 / sqrt(2 * 12 800) = 0.6 % of the true one, six times that
    torch.testing.assert_close(spread, noise, rtol=0.04, atol=0.0)


def test_every_division_into_segments_is_equally_likely() -> None:
    lengths = draw(torch.tensor(3), 20_000, 3, 46).lengths[:, 0]
    possible = [c for c in itertools.product(range(11, 14), repeat=4) if sum(c) == 46]
    assert len(possible) == 10
    counts = [int((lengths == torch.tensor(c)).all(dim=1).sum()) for c in possible]
    assert sum(counts) == 20_000
    # 2 000 each, standard deviation sqrt(2 000 * 0.9) = 42; five of them
    assert all(abs(count - 2_000) < 212 for count in counts)


def test_every_order_of_segments_is_equally_likely() -> None:
    order = draw(torch.tensor(4), 24_000, 3, 46).order[:, 0]
    counts = [int((order == torch.tensor(o)).all(dim=1).sum()) for o in itertools.permutations(range(4))]
    # 1 000 each, standard deviation 31; five of them
    assert all(abs(count - 1_000) < 155 for count in counts)


def test_two_in_five_samples_are_kept_the_ends_among_them() -> None:
    kept = draw(torch.tensor(6), 500, 4, 50).kept
    assert kept.shape == (500, 4, 20)
    assert bool((kept[..., 0] == 0).all())
    assert bool((kept[..., -1] == 49).all())
    assert bool((kept.diff(dim=-1) >= 0).all())
    inner = kept[..., 1:-1].flatten().bincount(minlength=50)
    # 36 000 points over 48 places: 750 each, standard deviation 27; five of them
    assert inner[0] == inner[49] == 0
    assert bool(((inner[1:49] - 750).abs() < 137).all())


def test_a_rotation_keeps_the_length_of_every_triad_and_nothing_else_of_its_direction() -> None:
    x = _windows(400, 7, 16).float()
    turned = augment(x, torch.full((400,), TRANSFORMS.index("rotation")), torch.tensor(2), torch.zeros(7))
    for triad in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(
            turned[:, triad].norm(dim=1), x[:, triad].norm(dim=1), rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(turned[:, 6], x[:, 6], rtol=0.0, atol=0.0)
    one = turned[:, :3, 0] - x[:, :3, 0]
    assert float(one.norm(dim=1).min()) > 0.0


def test_windows_that_are_too_short_are_refused() -> None:
    with pytest.raises(ShapeError, match="at least 8 samples, got 7"):
        augment(torch.zeros(1, 3, 7), torch.zeros(1).long(), torch.tensor(1), torch.ones(3))
