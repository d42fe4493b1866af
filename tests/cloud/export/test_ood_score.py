"""Scores against their definitions in plain NumPy, and their threshold."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from wearfleet_cloud.export.ood_score import (
    OOD_METHODS,
    CosineScore,
    EnergyScore,
    MahalanobisScore,
    MaxProbabilityScore,
    fit_centroids,
    fit_tied_gaussian,
    threshold_of,
)
from wearfleet_cloud.export.scored_classifier import (
    OodStatistics,
    embed,
    fit_ood,
    outputs_of,
    scored_classifier,
)
from wearfleet_protos.errors import ConfigError, ShapeError


def embeddings(count: int, features: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes with one shared, strongly unequal covariance."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(features, features)) * np.geomspace(3.0, 0.1, features)
    y = rng.integers(0, 3, count)
    means = np.random.default_rng(99).normal(0, 3, (3, features))
    return (rng.normal(size=(count, features)) @ mixing.T * 0.3 + means[y]).astype(np.float32), y.astype(
        np.int64
    )


def tied_covariance(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means = np.stack([z[y == c].mean(axis=0) for c in np.unique(y)])
    centred = z - means[np.searchsorted(np.unique(y), y)]
    return means, centred.T @ centred / len(z)


def slow_distance(z: np.ndarray, means: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """The textbook formula, window by window and class by class."""
    return np.array([min((row - m) @ np.linalg.solve(covariance, row - m) for m in means) for row in z])


def distance_of(z: np.ndarray, gaussian) -> np.ndarray:
    score = MahalanobisScore(gaussian)(torch.from_numpy(z), torch.zeros(len(z), 3))
    return score.numpy()


@pytest.mark.parametrize("features", [1, 7, 24])
def test_full_rank_score_is_the_mahalanobis_distance_of_the_textbook(features):
    z, y = embeddings(400, features, seed=0)
    new, _ = embeddings(50, features, seed=1)
    means, covariance = tied_covariance(z.astype(np.float64), y)
    expected = slow_distance(new.astype(np.float64), means, covariance + 1e-6 * np.eye(features))
    # float32 with sums of `features` terms, amplified by the ratio of the largest to the smallest variance
    np.testing.assert_allclose(distance_of(new, fit_tied_gaussian(z, y, rank=features)), expected, rtol=2e-3)


@pytest.mark.parametrize("rank", [1, 3, 10, 16])
def test_low_rank_score_is_the_distance_under_the_covariance_with_a_flat_tail(rank):
    z, y = embeddings(400, 24, seed=0)
    new, _ = embeddings(50, 24, seed=1)
    means, covariance = tied_covariance(z.astype(np.float64), y)
    values, vectors = np.linalg.eigh(covariance + 1e-6 * np.eye(24))
    values[: 24 - rank] = values[: 24 - rank].mean()  # ascending: all but the `rank` largest
    flat = vectors @ np.diag(values) @ vectors.T
    expected = slow_distance(new.astype(np.float64), means, flat)
    np.testing.assert_allclose(distance_of(new, fit_tied_gaussian(z, y, rank)), expected, rtol=2e-3)


def test_nearly_constant_features_do_not_drown_the_distance_in_rounding():
    # classes far apart in three directions, next to nothing in the other 61: what mean-pooled features look like
    rng = np.random.default_rng(5)
    directions = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    y = np.arange(400) % 4
    tail = rng.normal(0, 0.03, (400, 64)) @ directions.T
    z = (30.0 * directions[:, :4].T[y] + tail).astype(np.float32)
    score = MahalanobisScore(fit_tied_gaussian(z, y, rank=8))
    x, logits = torch.from_numpy(z), torch.zeros(400, 4)
    exact = copy.deepcopy(score).double()(x.double(), logits.double())
    # rounding of a coordinate, eps x 30, over its deviation of 0.03, twice and times the 8 deviations of a distance of
    # 64: 1e-3; |d|^2 - |p|^2 would round 900 / 0.03^2 = 1e6 to 0.1
    assert float((score(x, logits).double() - exact).abs().max()) < 2e-3


def test_class_without_windows_has_no_mean():
    z, y = embeddings(300, 6, seed=0)
    kept = y != 1
    gaussian = fit_tied_gaussian(z[kept], y[kept], rank=6)
    means, covariance = tied_covariance(z[kept].astype(np.float64), y[kept])
    assert len(gaussian.centres) == 2
    expected = slow_distance(z[:20].astype(np.float64), means, covariance + 1e-6 * np.eye(6))
    np.testing.assert_allclose(distance_of(z[:20], gaussian), expected, rtol=2e-3, atol=1e-3)


def test_dead_features_do_not_break_the_distance():
    z, y = embeddings(300, 10, seed=0)
    z[:, 4:] = 0.0
    assert np.isfinite(distance_of(z, fit_tied_gaussian(z, y, rank=10))).all()
    assert np.isfinite(distance_of(z, fit_tied_gaussian(z, y, rank=2))).all()


def test_energy_is_minus_the_logarithm_of_the_summed_exponentials():
    logits = np.array([[1.0, 2.0, -1.0], [300.0, 0.0, 0.0]], np.float32)
    score = EnergyScore()(torch.zeros(2, 4), torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(score, [-np.log(np.exp(1.0) + np.exp(2.0) + np.exp(-1.0)), -300.0], rtol=1e-6)


def test_maximum_probability_is_that_of_the_softmax_with_its_sign_turned():
    logits = np.array([[0.0, np.log(3.0)], [500.0, 0.0]], np.float32)
    score = MaxProbabilityScore()(torch.zeros(2, 4), torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(score, [-0.75, -1.0], rtol=1e-6)


def test_cosine_score_is_the_textbook_cosine_to_the_nearest_class_mean():
    z, y = embeddings(400, 7, seed=0)
    new, _ = embeddings(50, 7, seed=1)
    means = np.stack([z[y == c].mean(axis=0) for c in range(3)]).astype(np.float64)
    cosines = [
        max(row @ m / np.linalg.norm(row) / np.linalg.norm(m) for m in means)
        for row in new.astype(np.float64)
    ]
    score = CosineScore(fit_centroids(z, y))
    # float32 sums of 7 products of values up to 1
    np.testing.assert_allclose(
        score(torch.from_numpy(new), torch.zeros(50, 3)), -np.array(cosines), atol=1e-6
    )
    assert float(score(torch.zeros(1, 7), torch.zeros(1, 3))[0]) == 0.0


@pytest.mark.parametrize("method", OOD_METHODS)
def test_threshold_is_the_95th_percentile_over_source_validation(cnn, method):
    ood = fit_ood(cnn.model, cnn.x, cnn.y, cnn.x_validation, method=method)
    scores = outputs_of(scored_classifier(cnn.model, ood), cnn.x_validation)["ood_score"]
    assert ood.threshold == pytest.approx(np.percentile(scores.astype(np.float64), 95), rel=1e-12)
    assert (scores > ood.threshold).mean() == pytest.approx(0.05, abs=1 / len(scores))


def test_exported_threshold_flags_five_percent_of_validation_and_nearly_all_foreign_windows(cnn):
    ood = fit_ood(cnn.model, cnn.x, cnn.y, cnn.x_validation)
    foreign = np.random.default_rng(3).normal(0, 20, (100, 3, 64)).astype(np.float32)
    scores = outputs_of(scored_classifier(cnn.model, ood), foreign)["ood_score"]
    assert (scores > ood.threshold).mean() > 0.95


def test_fitting_leaves_the_model_in_training_mode_as_it_was(cnn):
    cnn.model.train()
    before = {name: tensor.clone() for name, tensor in cnn.model.state_dict().items()}
    try:
        fit_ood(cnn.model, cnn.x, cnn.y, cnn.x_validation)
        assert cnn.model.training
        assert all(torch.equal(before[name], tensor) for name, tensor in cnn.model.state_dict().items())
    finally:
        cnn.model.eval()


def test_statistics_are_fitted_in_evaluation_mode(cnn):
    features = cnn.model.features(torch.from_numpy(cnn.x)).detach().numpy()
    np.testing.assert_allclose(embed(cnn.model, cnn.x), features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("z", "y", "rank", "error", "words"),
    [
        (np.zeros((3, 2)), np.zeros(2, np.int64), 1, ShapeError, "got"),
        (np.zeros((1, 2)), np.zeros(1, np.int64), 1, ShapeError, "n >= 2"),
        (np.full((3, 2), np.nan), np.zeros(3, np.int64), 1, ShapeError, "NaN"),
        (np.zeros((3, 2)), np.zeros(3, np.int64), 0, ConfigError, "at least 1"),
    ],
)
def test_unusable_embeddings_are_refused(z, y, rank, error, words):
    with pytest.raises(error, match=words):
        fit_tied_gaussian(z.astype(np.float32), y, rank)


def test_unknown_method_names_the_known_ones(cnn):
    with pytest.raises(ConfigError, match="max-probability, energy, mahalanobis, cosine"):
        fit_ood(cnn.model, cnn.x, cnn.y, cnn.x_validation, method="guess")


def test_threshold_needs_finite_scores_and_windows(cnn):
    for scores in (np.empty(0, np.float32), np.array([1.0, np.nan], np.float32)):
        with pytest.raises(ShapeError, match="finite scores"):
            threshold_of(scores)
    with pytest.raises(ShapeError, match="at least one window"):
        fit_ood(cnn.model, cnn.x, cnn.y, cnn.x_validation[:0])


def test_statistics_of_another_method_are_refused(cnn):
    with pytest.raises(ConfigError, match="does not fit"):
        scored_classifier(cnn.model, OodStatistics("mahalanobis", 0.0, None))
