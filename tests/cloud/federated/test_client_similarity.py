"""Distances between clients and weights of mixtures: the oracle's numbers, and the laws of section 26."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import fedap as oracle
from wearfleet_cloud.federated.client_models import mixed
from wearfleet_cloud.federated.client_similarity import mixture_weights, wasserstein_distances

SIZES = (3, 5, 1)


def population(clients: int, seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, oracle.Moments]]:
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(clients, sum(SIZES)))
    variances = generator.uniform(0, 2, (clients, sum(SIZES)))
    bounds = np.cumsum((0, *SIZES))
    moments = {
        str(i): [(means[i, a:b], variances[i, a:b]) for a, b in pairwise(bounds)] for i in range(clients)
    }
    return means, np.sqrt(variances), moments


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 999), st.booleans(), st.floats(0, 1))
def test_distances_and_weights_are_the_oracles(clients: int, seed: int, squared: bool, own: float) -> None:
    means, deviations, moments = population(clients, seed)
    distances = wasserstein_distances(means, deviations, SIZES, squared=squared)
    for i in range(clients):
        for j in range(clients):
            expected = oracle.distance(moments[str(i)], moments[str(j)], squared=squared)
            assert distances[i, j] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    np.testing.assert_array_equal(distances, distances.T)
    if squared:
        return
    weights = mixture_weights(distances, own, np.ones(clients))
    for i in range(clients):
        row = oracle.weights_of(str(i), moments, own)
        np.testing.assert_allclose(weights[i], [row[str(j)] for j in range(clients)], rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(0, 999), st.floats(0, 1), st.integers(0, 7))
def test_rows_sum_to_one_and_clients_may_be_named_in_any_order(
    clients: int, seed: int, own: float, neighbours: int
) -> None:
    means, deviations, _ = population(clients, seed)
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 3, clients).astype(float)
    distances = wasserstein_distances(means, deviations, SIZES, squared=False)
    weights = mixture_weights(distances, own, counts, neighbours=neighbours)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-12)
    assert weights.min() >= 0.0
    order = generator.permutation(clients)
    shuffled = wasserstein_distances(means[order], deviations[order], SIZES, squared=False)
    np.testing.assert_array_equal(shuffled, distances[np.ix_(order, order)])
    again = mixture_weights(shuffled, own, counts[order], neighbours=neighbours)
    np.testing.assert_allclose(again, weights[np.ix_(order, order)], rtol=1e-12, atol=1e-15)


def test_only_the_nearest_neighbours_count() -> None:
    distances = np.array([[0, 1, 2, 4], [1, 0, 1, 3], [2, 1, 0, 2], [4, 3, 2, 0]], float)
    weights = mixture_weights(distances, 0.5, np.ones(4), neighbours=2)
    np.testing.assert_allclose(weights[0], [0.5, 1 / 3, 1 / 6, 0.0])


def test_equal_clients_share_and_a_client_alone_keeps_its_own() -> None:
    np.testing.assert_allclose(mixture_weights(np.zeros((3, 3)), 1 / 3, np.ones(3)), np.full((3, 3), 1 / 3))
    np.testing.assert_array_equal(mixture_weights(np.zeros((1, 1)), 0.3, np.ones(1)), [[1.0]])
    np.testing.assert_array_equal(mixture_weights(np.ones((2, 2)), 0.3, np.zeros(2)), np.eye(2))


def test_mixing_by_slices_is_mixing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    weights = generator.dirichlet(np.ones(3), 3)
    models = {
        "a": generator.normal(size=(3, 7, 11)).astype(np.float32),
        "b": generator.normal(size=(3,)).astype(np.float32),
    }
    monkeypatch.setattr("wearfleet_cloud.federated.client_models._BLOCK", 10)
    result = mixed(weights, models)
    for name, array in models.items():
        expected = sum(
            weights[:, j].reshape(-1, *([1] * (array.ndim - 1))) * array[j].astype(float) for j in range(3)
        )
        assert result[name].dtype == np.float32
        np.testing.assert_allclose(result[name], expected, rtol=2**-23, atol=1e-7)
