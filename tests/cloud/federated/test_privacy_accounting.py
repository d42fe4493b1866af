"""Accounting: anchors of the specification, composition, and what costs nothing or everything."""

import math
import sys

import pytest
from wearfleet_cloud.federated.privacy.accounting import Spend, epsilon_of
from wearfleet_protos.errors import ConfigError


@pytest.mark.parametrize(
    ("rate", "noise", "count", "expected"),
    [(0.01, 1.1, 1000, "1.73"), (0.01, 1.0, 1000, "2.11"), (0.1, 1.0, 300, "14.3")],
)
def test_the_anchors_of_the_specification(rate: float, noise: float, count: int, expected: str) -> None:
    """specs/federated.md 18, to the digits given there."""
    found = epsilon_of([Spend(noise, rate, count)], 1e-5)
    assert f"{found:.{len(expected.split('.')[1])}f}" == expected


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Of a Gaussian of sensitivity 1: Balle and Wang 2018, theorem 8."""
    phi = lambda x: 0.5 * math.erfc(-x / math.sqrt(2.0))  # noqa: E731
    return phi(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * phi(-0.5 / sigma - epsilon * sigma)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
def test_rounds_for_everyone_are_one_gaussian_and_exact(sigma: float) -> None:
    found = epsilon_of([Spend(sigma, 1.0, 9), Spend(sigma, 1.0, 7)], 1e-5)
    # the library solves for epsilon to a relative 1e-12; delta falls by a factor of at most e^(epsilon error)
    assert gaussian_delta(found, sigma / 4.0) == pytest.approx(1e-5, rel=1e-6)


def test_more_rounds_or_less_noise_cost_more_and_sampling_less() -> None:
    one = epsilon_of([Spend(1.0, 0.1, 100)], 1e-5)
    assert (
        one < epsilon_of([Spend(1.0, 0.1, 101)], 1e-5) < epsilon_of([Spend(1.0, 0.1, 100), Spend(1.0)], 1e-5)
    )
    assert one < epsilon_of([Spend(0.9, 0.1, 100)], 1e-5)
    assert one < epsilon_of([Spend(1.0, 1.0, 100)], 1e-5)
    assert epsilon_of([Spend(0.1, 0.3, 20)], 1e-2) <= epsilon_of([Spend(0.1, 1.0, 20)], 1e-2)


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon_of([], 1e-5) == epsilon_of([Spend(1.0, 1.0, 0)], 1e-5) == 0.0
    assert epsilon_of([Spend(1.0), Spend(0.0)], 1e-5) == math.inf


@pytest.mark.parametrize("numbers", [(-1.0, 1.0, 1), (1.0, 0.0, 1), (1.0, 1.5, 1), (1.0, 1.0, -1)])
def test_impossible_numbers_are_refused(numbers: tuple[float, float, int]) -> None:
    with pytest.raises(ConfigError):
        Spend(*numbers)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"wearfleet\[cloud,privacy\]"):
        epsilon_of([Spend(1.0)], 1e-5)
