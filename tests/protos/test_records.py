"""Secret batches and noise: their distribution, their limits, and what a plan may say of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from edge.tiny_graphs import make_plan
from wearfleet_protos.batching import batches
from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.plan import InputBinding, Loop, Plan
from wearfleet_protos.records import SecretSource, expected_batch, steps_of


def loop(rate: float, largest: int, steps: int = 1) -> Loop:
    return Loop("train", largest, 1, steps, shuffle=False, sampling_rate=rate)


def drawn(rate: float, largest: int, steps: int, count: int) -> list[np.ndarray]:
    return steps_of(loop(rate, largest, steps), 1, 1, count, np.random.default_rng(3))


def test_each_window_is_in_a_batch_with_the_rate_and_by_itself() -> None:
    steps, count, rate = 4000, 40, 0.2
    there = np.zeros((steps, count))
    for row, rows in zip(there, drawn(rate, 40, steps, count), strict=True):
        row[rows] = 1.0
    # standard errors over the steps; 40 shares and 780 covariances: five and five and a half of them
    assert np.abs(there.mean(axis=0) - rate).max() < 5.0 * math.sqrt(rate * (1 - rate) / steps)
    covariance = np.cov(there.T)[np.triu_indices(count, 1)]
    assert np.abs(covariance).max() < 5.5 * rate * (1 - rate) / math.sqrt(steps)


def test_a_batch_that_is_too_large_is_drawn_anew_and_leaves_each_window_its_rate() -> None:
    """P(window 0 is in | which others are) is q where there is room, and 0 where there is none."""
    steps, rate, largest = 40_000, 0.4, 2
    room, full = [], []
    for rows in drawn(rate, largest, steps, 5):
        others = int((rows != 0).sum())
        (room if others < largest else full).append(0 in rows)
    assert sum(full) == 0
    assert len(full) > 1000
    assert abs(np.mean(room) - rate) < 5.0 * math.sqrt(rate * (1 - rate) / len(room))


def test_of_a_long_recording_a_secret_part_takes_part() -> None:
    found = drawn(0.5, 10, 200, 90)
    assert len({row for rows in found for row in rows.tolist()}) == 20
    assert max(len(rows) for rows in found) <= 10
    assert expected_batch(loop(0.5, 10), 90) == 10.0
    assert expected_batch(loop(0.5, 10), 8) == 4.0


def test_an_empty_batch_is_a_step_too_and_without_windows_there_is_none() -> None:
    assert [len(rows) for rows in drawn(1e-9, 4, 3, 10)] == [0, 0, 0]
    assert drawn(0.5, 4, 3, 0) == []


def test_passes_are_what_they_were() -> None:
    passes = Loop("train", 4, 2, 0, shuffle=True)
    expected = list(batches(passes, 5, 6, 11))
    found = steps_of(passes, 5, 6, 11, SecretSource())
    assert len(found) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert expected_batch(passes, 11) == 0.0


def test_the_operating_systems_numbers_are_uniform_and_normal() -> None:
    source, count = SecretSource(), 100_001
    uniform, normal = source.random(count), source.standard_normal(count)
    assert uniform.shape == normal.shape == (count,)
    assert 0.0 <= uniform.min() < uniform.max() < 1.0
    # Kolmogorov and Smirnov: beyond 3.5 / sqrt(n) with probability 2 exp(-2 * 3.5^2) = 5e-11
    steps = np.arange(1, count + 1) / count
    assert np.abs(np.sort(uniform) - steps).max() < 3.5 / math.sqrt(count)
    distribution = np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in np.sort(normal)])
    assert np.abs(distribution - steps).max() < 3.5 / math.sqrt(count)
    half = count // 2  # both halves come from the same pairs
    assert abs(np.corrcoef(normal[:half], normal[half + 1 :])[0, 1]) < 5.0 / math.sqrt(half)
    assert not np.array_equal(normal, source.standard_normal(count))
    assert source.standard_normal(0).shape == (0,)


def secret_plan(**changes: object) -> Plan:
    plan = make_plan().plan
    train = next(phase for phase in plan.phases if phase.name == "train")
    secret = replace(train, **{"loop": loop(0.5, train.loop.batch_size, 3), "noise": 2, **changes})
    return replace(plan, phases=tuple(secret if phase is train else phase for phase in plan.phases))


def test_a_plan_with_secret_batches_survives_its_bytes_and_others_do_not_mention_them() -> None:
    plan = secret_plan()
    assert Plan.from_bytes(plan.to_bytes()) == plan
    assert plan.protects_windows()
    bare = make_plan().plan
    assert not bare.protects_windows()
    assert b"sampling_rate" not in bare.to_bytes()
    assert b"noise" not in bare.to_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"loop": Loop("train", 8, 2, 3, shuffle=False, sampling_rate=0.5)},
        {"loop": Loop("train", 8, 1, 0, shuffle=False, sampling_rate=0.5)},
        {"loop": Loop("train", 8, 1, 3, shuffle=True, sampling_rate=0.5)},
        {"loop": Loop("train", 8, 1, 3, shuffle=False, sampling_rate=1.5)},
        {"loop": Loop("train", 8, 1, 3, shuffle=False, sampling_rate=-0.5)},
        {"loop": Loop("train", 8, 1, 3, shuffle=False, sampling_rate=math.nan)},
        {"loop": Loop("train", 8, 1, 3, shuffle=False)},
        {"noise": 0},
        {"noise": 10**9},
        {"noise": 0, "loop": Loop("train", 8, 1, 3, False), "inputs": (InputBinding("n", "batch", "noise"),)},
    ],
)
def test_secret_batches_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match=r"secret batches|noise"):
        secret_plan(**changes)
