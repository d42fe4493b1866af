"""T15: a made-up table of results gives what each selection rule must make of it."""

from __future__ import annotations

import pytest
from wearfleet_cloud.training.benchmark.protocol import Trial, choose, overall, spread

_SEEDS = (0, 42, 96)
# (method, target, configuration): validation and target accuracy at the step kept by validation, seed by seed
_RESULTS = {
    ("a", "0", 0): ((0.90, 0.90, 0.90), (0.50, 0.60, 0.70)),
    ("a", "0", 1): ((0.90, 0.90, 0.90), (0.90, 0.90, 0.90)),  # equal by validation: the first stays
    ("a", "0", 2): ((0.99, 0.80, 0.80), (0.95, 0.95, 0.20)),  # best single seed, lower mean by validation
    ("a", "1", 0): ((0.70, 0.70, 0.70), (0.80, 0.70, 0.60)),
    ("a", "1", 1): ((0.80, 0.80, 0.80), (0.30, 0.40, 0.50)),  # another target, another choice
    ("a", "1", 2): ((0.10, 0.10, 0.10), (0.10, 0.10, 0.10)),
    ("b", "0", 0): ((0.00, 0.00, 0.00), (0.20, 0.20, 0.20)),  # nothing learned is a result too
    ("b", "1", 0): ((0.50, 0.50, 0.50), (0.40, 0.40, 0.40)),
}


def _trials(oracle: bool) -> list[Trial]:
    return [
        Trial(*key, seed, score=(target if oracle else validation)[place], accuracy=target[place])
        for key, (validation, target) in _RESULTS.items()
        for place, seed in enumerate(_SEEDS)
    ]


def test_validation_takes_the_first_of_the_best_means_for_each_target() -> None:
    chosen = choose(_trials(oracle=False), _SEEDS)
    assert {cell: one.configuration for cell, one in chosen.items()} == {
        ("a", "0"): 0,
        ("a", "1"): 1,
        ("b", "0"): 0,
        ("b", "1"): 0,
    }
    assert chosen["a", "0"].by_seed == {0: 0.50, 42: 0.60, 96: 0.70}
    assert chosen["a", "1"].by_seed == {0: 0.30, 42: 0.40, 96: 0.50}


def test_the_oracle_takes_the_best_mean_on_the_target_and_reports_the_same_numbers() -> None:
    chosen = choose(_trials(oracle=True), _SEEDS)
    assert chosen["a", "0"].configuration == 1
    assert chosen["a", "0"].by_seed == {0: 0.90, 42: 0.90, 96: 0.90}
    assert chosen["a", "1"].configuration == 0


def test_deviations_are_of_the_population_and_the_overall_one_is_over_seeds_of_means_over_targets() -> None:
    chosen = choose(_trials(oracle=False), _SEEDS)
    cell = spread(chosen["a", "0"].by_seed.values())
    assert (cell.mean, cell.deviation) == (pytest.approx(0.6), pytest.approx((0.02 / 3) ** 0.5))
    total = overall(chosen, "a", ["0", "1"])
    assert total is not None
    # seeds: (0.5 + 0.3) / 2, (0.6 + 0.4) / 2, (0.7 + 0.5) / 2
    assert (total.mean, total.deviation) == (pytest.approx(0.5), pytest.approx((0.02 / 3) ** 0.5))


def test_a_configuration_without_all_seeds_does_not_count() -> None:
    trials = [t for t in _trials(oracle=True) if (t.configuration, t.seed) != (1, 96)]
    chosen = choose(trials, _SEEDS)
    assert chosen["a", "0"].configuration == 2  # 0.70 on average, configuration 0 has 0.60
    assert chosen["a", "1"].configuration == 0
    only = [t for t in trials if t.method == "b" and t.seed != 0]
    assert choose(only, _SEEDS) == {}
    assert overall(choose(trials, _SEEDS), "b", ["0", "1", "2"]) is None
