"""Ranks and tests against the worked example of Demsar 2006, pictures against what they must show."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from wearfleet_cloud.training.benchmark.figures import draw_critical_difference, draw_ranks
from wearfleet_cloud.training.benchmark.rows import COLUMNS, Row, trial_columns
from wearfleet_cloud.training.benchmark.run_figures import plane
from wearfleet_cloud.training.benchmark.statistics import (
    Comparison,
    cliques,
    compare,
    critical_difference,
    friedman_p,
    ranks,
)
from wearfleet_cloud.training.benchmark.tables import markdown

# Demsar 2006, table 6: AUC of C4.5, C4.5+m, C4.5+cf and C4.5+m+cf on 14 data sets
_AUC = np.array(
    [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975],
        [0.957, 0.978, 0.946, 0.970],
    ]
)


def test_the_published_example_comes_out() -> None:
    mean = ranks(_AUC).mean(axis=0)
    np.testing.assert_allclose(mean, [3.143, 2.000, 2.893, 1.964], atol=5e-4)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    assert friedman_p(_AUC) < 0.05  # chi squared 9.28 with 3 degrees of freedom
    assert cliques(mean.tolist(), critical_difference(4, 14)) == [(0, 3)]
    assert cliques(mean.tolist(), 1.16) == [(0, 2), (1, 3)]


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (5, 2.728), (10, 3.164)])
def test_critical_values_are_those_of_the_published_table(methods: int, q: float) -> None:
    expected = q * math.sqrt(methods * (methods + 1) / (6 * 20))
    assert critical_difference(methods, 20) == pytest.approx(expected, rel=1e-3)


def test_too_few_methods_have_no_test() -> None:
    assert math.isnan(friedman_p(_AUC[:, :2]))
    assert math.isnan(friedman_p(_AUC[:1]))


def _row(method: str, target: str, seed: int, accuracy: float, score: float = 0.5, **more: str) -> Row:
    row = dict.fromkeys(COLUMNS, "")
    about = {"dataset": "d", "scenario": "cross-person", "backbone": "cnn", "target_name": f"person {target}"}
    row |= {**about, "method": method, "target": target, "seed": str(seed), "configuration": "0"}
    for rule in ("source-validation", "mixup-validation", "oracle"):
        row[trial_columns(rule)["score"]] = str(score)
        row[trial_columns(rule)["target_accuracy"]] = str(accuracy)
    return {**row, **more}


def test_methods_are_compared_on_the_targets_that_all_of_them_have() -> None:
    rows = [_row(m, t, s, a) for m, a in (("a", 0.5), ("b", 0.75)) for t in "01" for s in (0, 1)]
    rows += [_row("c", "0", s, 0.9) for s in (0, 1)]
    found = compare(rows, "source-validation")
    assert (found.methods, found.missing) == (("a", "b"), ("c",))
    assert found.blocks == ("d cross-person cnn person 0", "d cross-person cnn person 1")
    assert found.accuracy.tolist() == [[0.5, 0.75], [0.5, 0.75]]


def test_a_table_shows_means_deviations_and_what_was_not_honest() -> None:
    rows = [_row("a", "0", 0, 0.5), _row("a", "0", 1, 0.7), _row("a", "1", 0, 0.9), _row("a", "1", 1, 0.7)]
    rows += [_row("sot", t, s, 1.0, transductive="True") for t in "01" for s in (0, 1)]
    rows += [_row("b", "0", 0, 1.0), _row("b", "0", 1, 0.0, error="DataError: none")]
    lines = markdown(rows, "source-validation").splitlines()
    assert "| a | 60.0 ± 10.0 | 80.0 ± 10.0 | 70.0 ± 0.0 |" in lines
    assert "| sot (transductive) | 100.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 |" in lines
    assert "| b | - | - | - |" in lines
    assert "- b, target 0: DataError: none" in lines


def test_pictures_are_drawn(tmp_path: Path) -> None:
    methods = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
    comparison = Comparison(methods, tuple(map(str, range(14))), _AUC, ())
    for draw in (draw_ranks, draw_critical_difference):
        draw(comparison, "Demsar 2006", tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "picture.png").unlink()


def test_a_projection_keeps_what_is_apart_apart() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(60, 8)).astype(np.float32)
    features[30:] += 40.0
    for kind in ("pca", "tsne"):
        points = plane(features, kind)
        assert points.shape == (60, 2)
        distance = np.linalg.norm(points[:, None] - points[None], axis=2)
        assert distance[:30, 30:].min() > distance[:30, :30].max() / (1 if kind == "pca" else 2)
    np.testing.assert_array_equal(plane(features, "tsne"), plane(features, "tsne"))
