"""Counter-based random numbers are random enough, and the same bits everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from wearfleet_models import randomness

_N = 200_000


def _mix(x: np.ndarray) -> np.ndarray:
    """The mixing function again, in unsigned NumPy arithmetic with real shifts."""
    mask = np.uint64(0xFFFFFFFF)
    x = ((x ^ (x >> np.uint64(12))) * np.uint64(0x2C1B3C6D)) & mask
    x = ((x ^ (x >> np.uint64(12))) * np.uint64(0x297A2D39)) & mask
    return x ^ (x >> np.uint64(15))


def _bits(key: int, salt: int, count: int) -> np.ndarray:
    mask = np.uint64(0xFFFFFFFF)
    low = _mix(np.uint64(key) & mask ^ np.uint64(0x5BF03635))
    high = _mix(np.uint64(key) >> np.uint64(32) ^ low)
    low = _mix((low + np.uint64(salt)) & mask)
    high = _mix(high ^ _mix(low ^ np.uint64(0x27D4EB2F)))
    return _mix(_mix((np.arange(count, dtype=np.uint64) + low) & mask) ^ high)


@pytest.mark.parametrize("key", [0, 1, 2**31 - 1, 2**40 + 17, 2**62 - 1])
@pytest.mark.parametrize("salt", [0, 5, 2**32 - 1])
def test_torch_and_numpy_draw_the_same_bits(key: int, salt: int) -> None:
    drawn = randomness.bits(torch.tensor(key), salt, (1000,)).numpy()
    np.testing.assert_array_equal(drawn.astype(np.uint64), _bits(key, salt, 1000))


@pytest.mark.parametrize("key", [0, 3, 2**50])
def test_uniform_numbers_are_uniform(key: int) -> None:
    u = randomness.uniform(torch.tensor(key), 1, (_N,)).double()
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    assert abs(float(u.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / _N)
    assert abs(float(u.var()) - 1 / 12) < 5 * math.sqrt(1 / 180 / _N)
    counts = torch.histc(u.float(), bins=256, min=0.0, max=1.0)
    chi_square = float(((counts - _N / 256) ** 2 / (_N / 256)).sum())
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_neighbouring_positions_salts_and_keys_are_not_correlated() -> None:
    base = randomness.uniform(torch.tensor(9), 0, (_N,)).double() - 0.5
    others = [
        base.roll(1),
        randomness.uniform(torch.tensor(9), 1, (_N,)).double() - 0.5,
        randomness.uniform(torch.tensor(10), 0, (_N,)).double() - 0.5,
    ]
    for other in others:
        assert abs(float((base * other).mean()) * 12) < 5 / math.sqrt(_N)


def test_every_bit_is_balanced() -> None:
    drawn = randomness.bits(torch.tensor(77), 2, (_N,))
    for bit in range(32):
        share = float(((drawn // 2**bit) % 2).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(_N), bit


def test_first_numbers_of_consecutive_keys_are_uniform() -> None:
    keys = torch.arange(20_000)
    first = vmap(lambda key: randomness.uniform(key, 0, (1,)))(keys).flatten()
    counts = torch.histc(first, bins=64, min=0.0, max=1.0)
    chi_square = float(((counts - 20_000 / 64) ** 2 / (20_000 / 64)).sum())
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    z = randomness.normal(torch.tensor(4), 0, (_N,)).double()
    assert abs(float(z.mean())) < 5 / math.sqrt(_N)
    assert abs(float(z.var()) - 1.0) < 5 * math.sqrt(2 / _N)
    assert abs(float((z**4).mean()) - 3.0) < 5 * math.sqrt(96 / _N)
    assert z.isfinite().all()


def test_integers_are_below_their_bound_and_all_of_them_occur() -> None:
    high = torch.tensor([[1], [3], [1000]])
    drawn = randomness.integers(torch.tensor(5), 0, (3, 20_000), high)
    assert (drawn >= 0).all()
    assert (drawn < high).all()
    assert [len(row.unique()) for row in drawn] == [1, 3, 1000]


def test_a_permutation_holds_everything_once_and_is_not_always_the_same() -> None:
    orders = [tuple(randomness.permutation(torch.tensor(key), 0, 4).tolist()) for key in range(400)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(set(orders)) == 24


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 5.0])
def test_beta_numbers_have_the_moments_of_the_beta_distribution(alpha: float) -> None:
    count = 40_000
    keys = torch.arange(count)
    drawn = vmap(lambda key: randomness.beta(key, 3, torch.tensor(alpha)))(keys).double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(drawn.mean()) - 0.5) < 5 * math.sqrt(variance / count)
    assert abs(float(drawn.var()) - variance) < 5 * math.sqrt(1 / count) * variance * 2
    assert float(drawn.min()) >= 0.0
    assert float(drawn.max()) <= 1.0


def test_derived_keys_differ_and_are_valid_keys() -> None:
    keys = [int(randomness.derive(torch.tensor(1), salt)) for salt in range(2_000)]
    assert len(set(keys)) == 2_000
    assert all(0 <= key < 2**62 for key in keys)
    by_tensor = vmap(lambda salt: randomness.derive(torch.tensor(1), salt))(torch.arange(2_000))
    assert by_tensor.tolist() == keys


def test_a_traced_draw_follows_its_key() -> None:
    def draw(key: torch.Tensor) -> torch.Tensor:
        return torch.stack([randomness.normal(key, 0, ()), randomness.beta(key, 1, torch.tensor(0.3))])

    traced = make_fx(draw)(torch.tensor(1))
    for key in (1, 2, 2**40):
        torch.testing.assert_close(traced(torch.tensor(key)), draw(torch.tensor(key)), rtol=0.0, atol=0.0)
