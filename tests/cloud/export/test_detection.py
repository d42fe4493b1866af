"""Detection figures against counting, and which windows are set against which."""

from __future__ import annotations

import numpy as np
import pytest
from wearfleet_cloud.export.detection import UnknownWindows, compare_scores, detection
from wearfleet_cloud.export.ood_score import OOD_METHODS
from wearfleet_protos.errors import DataError


def test_auroc_and_fpr_count_pairs_and_windows() -> None:
    generator = np.random.default_rng(0)
    inside = generator.integers(0, 8, 60).astype(np.float32)
    outside = generator.integers(3, 11, 40).astype(np.float32)
    found = detection(inside, outside)
    pairs = [(o > i) + 0.5 * (o == i) for i in inside for o in outside]
    assert found.auroc == pytest.approx(np.mean(pairs), rel=1e-12)
    threshold = np.sort(inside)[56:58]  # the 95th percentile lies between the values at 0.95 * 59 = 56.05
    expected = (outside <= threshold[0] + 0.05 * (threshold[1] - threshold[0])).mean()
    assert found.fpr95 == pytest.approx(expected)


def test_average_precision_by_hand() -> None:
    # by descending score: unknown, known, unknown, known; precision at each unknown 1/1 and 2/3
    found = detection(np.array([3.0, 1.0], np.float32), np.array([4.0, 2.0], np.float32))
    assert found.aupr_out == pytest.approx((1.0 + 2.0 / 3.0) / 2.0)
    # and by ascending score: known, unknown, known, unknown
    assert found.aupr_in == pytest.approx((1.0 + 2.0 / 3.0) / 2.0)


def test_a_perfect_score_and_a_useless_one() -> None:
    low, high = np.arange(100, dtype=np.float32), np.arange(200, 300, dtype=np.float32)
    perfect, turned = detection(low, high), detection(high, low)
    assert (perfect.auroc, perfect.aupr_in, perfect.aupr_out, perfect.fpr95) == (1.0, 1.0, 1.0, 0.0)
    assert (turned.auroc, turned.fpr95) == (0.0, 1.0)


def test_a_set_without_windows_is_refused() -> None:
    with pytest.raises(DataError, match="got 0 and 3"):
        detection(np.empty(0, np.float32), np.ones(3, np.float32))


def test_every_score_is_compared_on_every_set_and_finds_windows_from_far_away(cnn) -> None:
    foreign = np.random.default_rng(3).normal(0, 20, (100, 3, 64)).astype(np.float32)
    half = len(cnn.x_validation) // 2
    sets = [
        UnknownWindows("foreign", cnn.x_validation, foreign),
        UnknownWindows("the same", cnn.x_validation[:half], cnn.x_validation[half:]),
    ]
    found = compare_scores(cnn.model, cnn.x, cnn.y, sets)
    assert {name: tuple(scores) for name, scores in found.items()} == {
        "foreign": OOD_METHODS,
        "the same": OOD_METHODS,
    }
    assert found["foreign"]["mahalanobis"].auroc > 0.95
    assert all(0.3 < one.auroc < 0.7 for one in found["the same"].values())
