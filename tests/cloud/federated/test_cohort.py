import pytest
from hypothesis import given
from hypothesis import strategies as st
from wearfleet_cloud.federated.cohort import CohortPolicy, select_cohort
from wearfleet_protos.errors import ConfigError

CLIENTS = [f"client-{i:02d}" for i in range(20)]


@given(
    connected=st.lists(st.sampled_from(CLIENTS), unique=True, min_size=1),
    size=st.integers(0, 25),
    factor=st.floats(1.0, 2.0),
    seed=st.integers(0, 2**40),
)
def test_a_cohort_is_a_sorted_sample_of_the_right_size(
    connected: list[str], size: int, factor: float, seed: int
) -> None:
    policy = CohortPolicy(size, 1, factor)
    cohort = select_cohort(connected, policy, seed=seed, round_number=1)
    assert list(cohort) == sorted(set(cohort))
    assert set(cohort) <= set(connected)
    assert policy.wanted(len(cohort)) <= len(cohort)
    if size == 0:
        assert len(cohort) == len(connected)
    else:
        assert min(size, len(connected)) <= len(cohort) <= min(2 * size, len(connected))
    assert cohort == select_cohort(list(reversed(connected)), policy, seed=seed, round_number=1)


def test_rounds_and_seeds_draw_differently_and_everyone_gets_a_turn() -> None:
    policy = CohortPolicy(5)
    rounds = [select_cohort(CLIENTS, policy, seed=1, round_number=r) for r in range(1, 201)]
    assert len(set(rounds)) > 190
    assert rounds[0] != select_cohort(CLIENTS, policy, seed=2, round_number=1)
    turns = [sum(client in cohort for cohort in rounds) for client in CLIENTS]
    assert min(turns) >= 25  # 50 expected, standard deviation 6
    assert max(turns) <= 80


def test_a_cohort_waits_until_enough_clients_are_connected() -> None:
    policy = CohortPolicy(2, min_connected=4)
    assert select_cohort(CLIENTS[:3], policy, seed=0, round_number=1) == ()
    assert len(select_cohort(CLIENTS[:4], policy, seed=0, round_number=1)) == 2


@pytest.mark.parametrize(
    "numbers", [(-1, 1, 1.0), (1, 0, 1.0), (1, 1, 0.9), (1, 1, 2.1), (1, 1, float("nan"))]
)
def test_impossible_policies_are_refused(numbers: tuple[int, int, float]) -> None:
    with pytest.raises(ConfigError):
        CohortPolicy(*numbers)
