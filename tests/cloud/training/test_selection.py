"""The three selection rules, and the mixtures that one of them scores on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from wearfleet_cloud.training.examination import mixed_pairs, mixed_windows, soft_accuracy
from wearfleet_cloud.training.selection import RULES, Best, Scores, select, select_all
from wearfleet_protos.errors import DataError


def _scores(source: float, mixup: float = 0.0, target: float = 0.0) -> Scores:
    return Scores(source, mixup, target, target)


def test_the_first_of_the_best_is_kept() -> None:
    best = None
    for step, accuracy in [(100, 0.5), (200, 0.8), (300, 0.8), (400, 0.7)]:
        best = select("source-validation", best, step, _scores(accuracy))
    assert best == Best(200, _scores(0.8))


def test_the_first_evaluation_is_kept_even_when_everything_is_wrong() -> None:
    assert select("source-validation", None, 100, _scores(0.0)) == Best(100, _scores(0.0))


def test_each_rule_chooses_by_its_own_measure_and_none_the_step_by_the_target() -> None:
    best = None
    evaluations = [_scores(0.9, 0.2, 0.1), _scores(0.8, 0.7, 0.2), _scores(0.7, 0.6, 1.0)]
    for step, scores in enumerate(evaluations):
        best = select_all(best, step, scores)
    assert best is not None
    assert {rule: kept.step for rule, kept in best.items()} == {
        "source-validation": 0,
        "mixup-validation": 1,
        "oracle": 0,
    }
    assert [rule for rule, how in RULES.items() if "target" in how.configuration_by] == ["oracle"]


@pytest.mark.parametrize("sizes", [(5, 9, 20), (1, 30), (0, 3, 4)])
def test_partners_come_from_every_window_of_the_other_domains_and_no_other(sizes: tuple[int, ...]) -> None:
    domain = np.repeat(np.arange(len(sizes)), sizes)
    seen: list[set[int]] = [set() for _ in domain]
    for seed in range(300):
        pairs = mixed_pairs(sizes, seed)
        assert pairs.first.tolist() == list(range(sum(sizes)))
        for first, second in zip(pairs.first, pairs.second, strict=True):
            seen[first].add(int(second))
    for first, partners in enumerate(seen):
        assert partners == {int(n) for n in np.flatnonzero(domain != domain[first])}


def test_a_single_domain_mixes_with_itself_and_no_window_is_an_error() -> None:
    assert set(mixed_pairs([4], 0).second.tolist()) <= {0, 1, 2, 3}
    with pytest.raises(DataError, match="held-out windows"):
        mixed_pairs([], 0)


def test_mixtures_lie_between_their_windows_and_are_fixed() -> None:
    x = [np.full((3, 2, 4), 1.0, np.float32), np.full((2, 2, 4), 3.0, np.float32)]
    domains = [(x[0], np.array([0, 1, 2])), (x[1], np.array([3, 4]))]
    mixed, again = (mixed_windows(domains, 7, torch.device("cpu")) for _ in range(2))
    share = mixed.share[:3, None, None]
    torch.testing.assert_close(mixed.x[:3], (share + 3.0 * (1.0 - share)).expand(3, 2, 4))
    assert mixed.y.tolist() == [0, 1, 2, 3, 4]
    assert mixed.other[:3].min() >= 3 > mixed.other[3:].max()
    assert torch.equal(mixed.x, again.x)


def test_soft_accuracy_counts_both_labels_by_their_share() -> None:
    predicted = torch.tensor([1, 2, 3, 0])
    y, other = torch.tensor([1, 0, 0, 0]), torch.tensor([0, 2, 1, 0])
    share = torch.tensor([0.75, 0.75, 0.5, 0.25])
    assert float(soft_accuracy(predicted, y, other, share)) == (0.75 + 0.25 + 0.0 + 1.0) / 4
