"""Metrics against scikit-learn, selection against its rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from wearfleet_cloud.training import metrics
from wearfleet_cloud.training.scoring import score
from wearfleet_cloud.training.selection import mean_over_domains
from wearfleet_models import ModelSpec, build_classifier
from wearfleet_protos.errors import ConfigError, DataError, ShapeError


@pytest.mark.parametrize("present", [range(6), [1, 4], [3]])
def test_scores_are_those_of_scikit_learn(present) -> None:
    generator = np.random.default_rng(len(list(present)))
    actual, predicted = generator.choice(present, 200), generator.choice(present, 200)
    confusion = metrics.confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(actual), 6)
    np.testing.assert_array_equal(confusion.numpy(), confusion_matrix(actual, predicted, labels=range(6)))
    assert metrics.accuracy_of(confusion) == pytest.approx(accuracy_score(actual, predicted), abs=1e-12)
    assert metrics.macro_f1(confusion) == pytest.approx(
        f1_score(actual, predicted, average="macro"), abs=1e-12
    )


def test_scores_of_nothing_are_refused() -> None:
    for function in (metrics.accuracy_of, metrics.macro_f1):
        with pytest.raises(DataError, match="at least one window"):
            function(torch.zeros(3, 3, dtype=torch.int64))


def test_evaluation_uses_running_statistics_in_any_batching_and_restores_the_mode(monkeypatch) -> None:
    model = build_classifier(ModelSpec("cnn", 3, 40, 4, kernel=5)).train()
    x, y = torch.randn(10, 3, 40), torch.randint(0, 4, (10,))
    tensors = model.state_dict()
    whole = metrics.evaluate(model, tensors, x, y, 4)
    monkeypatch.setattr(metrics, "_EVALUATION_BATCH", 3)
    assert torch.equal(metrics.evaluate(model, tensors, x, y, 4), whole)
    assert model.training
    assert int(model.backbone.norm1.num_batches_tracked) == 0
    expected = metrics.confusion_matrix(model.eval()(x).argmax(1), y, 4)
    assert torch.equal(whole, expected)


def test_class_scores_add_up() -> None:
    model = build_classifier(ModelSpec("cnn", 3, 40, 3, kernel=5)).eval()
    x, y = np.random.default_rng(0).standard_normal((30, 3, 40), dtype=np.float32), np.arange(30) % 3
    result = score(model, x, y, ["walk", "sit", "lie"])
    assert [c.activity for c in result.classes] == ["walk", "sit", "lie"]
    assert [c.windows for c in result.classes] == [10, 10, 10]
    assert np.mean([c.recall for c in result.classes]) == pytest.approx(result.accuracy, abs=1e-6)
    assert np.sum(result.confusion) == result.windows == 30


def test_a_model_for_other_windows_is_refused() -> None:
    model = build_classifier(ModelSpec("cnn", 3, 40, 3, kernel=5))
    with pytest.raises(ShapeError, match=r"\(3, 40, 3\).*\(4, 40, 3\)"):
        score(model, np.zeros((2, 4, 40), np.float32), np.zeros(2, np.int64), ["a", "b", "c"])


def test_domains_count_equally_whatever_their_size() -> None:
    assert mean_over_domains([0.5, 1.0]) == 0.75
    with pytest.raises(ConfigError, match="at least one source domain"):
        mean_over_domains([])
