"""The average: known answers, laws, refusals."""

import itertools
import tracemalloc
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wearfleet_cloud.federated.aggregate import (
    Arrays,
    Averaged,
    Averaging,
    Contribution,
    moved,
)
from wearfleet_protos.errors import AggregationError
from wearfleet_protos.plan import UploadSpec
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

GROUPS = (TensorGroup.PARAM, TensorGroup.BUFFER)
ROLES = (TensorRole.SHARED, TensorRole.NORM_STAT, TensorRole.COUNTER)
SPECS = (
    TensorSpec("w", "float32", (3,), TensorRole.SHARED, TensorGroup.PARAM),
    TensorSpec("f", "float32", (2,), TensorRole.FROZEN, TensorGroup.BUFFER),
    TensorSpec("m", "float32", (2,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
    TensorSpec("v", "float32", (2,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
    TensorSpec("n", "int64", (), TensorRole.COUNTER, TensorGroup.BUFFER),
)
VALUE = UploadSpec(ROLES, GROUPS, "value")
DELTA = UploadSpec(ROLES, GROUPS, "delta")
PLAIN = Averaging()


def tensors(w: list[float], m: list[float], v: list[float], n: int) -> Arrays:
    return {
        "w": np.asarray(w, np.float32),
        "m": np.asarray(m, np.float32),
        "v": np.asarray(v, np.float32),
        "n": np.asarray(n, np.int64),
    }


CURRENT = {**tensors([1, 1, 1], [0, 0], [1, 1], 5), "f": np.asarray([3, 4], np.float32)}


def from_client(client: str, num_examples: int, update: Arrays) -> Contribution:
    return Contribution(client, num_examples, lambda: update)


def average(
    specs: tuple[TensorSpec, ...],
    upload: UploadSpec,
    current: Arrays,
    updates: Iterable[Contribution],
    averaging: Averaging = PLAIN,
) -> Averaged:
    """What FedAvg's server does."""
    mean = averaging.combine(specs, upload, current, updates)
    return Averaged(moved(current, mean, upload), mean)


def random_updates(count: int, seed: int) -> list[Contribution]:
    generator = np.random.default_rng(seed)
    return [
        from_client(
            f"client-{i}",
            int(generator.integers(1, 100)),
            tensors(
                list(generator.normal(size=3)),
                list(generator.normal(size=2)),
                list(generator.uniform(0.1, 2, 2)),
                int(generator.integers(0, 50)),
            ),
        )
        for i in range(count)
    ]


def test_three_clients_by_hand() -> None:
    updates = [
        from_client("a", 1, tensors([4, 0, 0], [0, 0], [1, 1], 7)),
        from_client("b", 2, tensors([1, 3, 0], [0, 3], [1, 1], 9)),
        from_client("c", 1, tensors([0, 0, 8], [0, 0], [1, 1], 2)),
    ]
    result = average(SPECS, VALUE, CURRENT, updates)
    np.testing.assert_allclose(result.tensors["w"], [1.5, 1.5, 2.0])
    np.testing.assert_allclose(result.tensors["m"], [0, 1.5])
    np.testing.assert_allclose(result.tensors["v"], [1, 1 + 0.5 * 1.5**2 + 0.5 * 1.5**2])
    assert result.tensors["n"] == 9
    np.testing.assert_array_equal(result.tensors["f"], CURRENT["f"])
    assert (result.mean.clients, result.mean.num_examples) == (("a", "b", "c"), 4)


def test_differences_are_added_to_the_current_tensors() -> None:
    update = tensors([1, 2, 3], [1, 0], [0.5, 0], 4)
    result = average(SPECS, DELTA, CURRENT, [from_client("a", 3, update)])
    np.testing.assert_allclose(result.tensors["w"], [2, 3, 4])
    np.testing.assert_allclose(result.tensors["v"], [1.5, 1])
    assert result.tensors["n"] == 9
    assert {n: (a.dtype, a.shape) for n, a in result.tensors.items()} == {
        n: (a.dtype, a.shape) for n, a in CURRENT.items()
    }


def test_pooled_moments_are_those_of_all_samples_together() -> None:
    generator = np.random.default_rng(0)
    samples = [generator.normal(k, 1 + k, (size, 2)) for k, size in enumerate((50, 200, 10))]
    updates = [
        from_client(str(k), len(s), tensors([0, 0, 0], list(s.mean(0)), list(s.var(0)), 0))
        for k, s in enumerate(samples)
    ]
    together = np.concatenate(samples)
    result = average(SPECS, VALUE, CURRENT, updates)
    np.testing.assert_allclose(result.tensors["m"], together.mean(0), rtol=1e-5)
    np.testing.assert_allclose(result.tensors["v"], together.var(0), rtol=1e-5)
    naive = average(SPECS, VALUE, CURRENT, updates, Averaging(statistics="naive"))
    assert (naive.tensors["v"] < 0.96 * result.tensors["v"]).all()


def test_uniform_weights_ignore_the_number_of_windows() -> None:
    updates = [
        from_client("a", 1, tensors([0, 0, 0], [0, 0], [1, 1], 0)),
        from_client("b", 999, tensors([2, 2, 2], [0, 0], [1, 1], 0)),
    ]
    result = average(SPECS, VALUE, CURRENT, updates, Averaging(weighting="uniform"))
    np.testing.assert_allclose(result.tensors["w"], [1, 1, 1])


def test_the_order_of_arrival_changes_not_one_bit() -> None:
    updates = random_updates(5, seed=1)
    results = [average(SPECS, VALUE, CURRENT, order).tensors for order in itertools.permutations(updates)]
    for result in results[1:]:
        assert all(result[name].tobytes() == results[0][name].tobytes() for name in result)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3),
    counts=st.lists(st.integers(1, 10_000), min_size=1, max_size=6),
)
def test_equal_updates_return_themselves(values: list[float], counts: list[int]) -> None:
    update = tensors(values, values[:2], [abs(v) for v in values[:2]], 3)
    updates = [from_client(str(i), n, update) for i, n in enumerate(counts)]
    result = average(SPECS, VALUE, CURRENT, updates).tensors
    for name, array in update.items():
        np.testing.assert_array_equal(result[name], array)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 6))
def test_the_average_is_that_of_the_formula_and_lies_between_the_updates(seed: int, count: int) -> None:
    updates = random_updates(count, seed)
    result = average(SPECS, VALUE, CURRENT, updates).tensors
    weights = np.array([u.num_examples for u in updates], float)
    stacked = np.stack([u.load()["w"].astype(float) for u in updates])
    np.testing.assert_allclose(result["w"], weights / weights.sum() @ stacked, rtol=1e-5, atol=1e-6)
    assert (stacked.min(0) - 1e-6 <= result["w"]).all()
    assert (result["w"] <= stacked.max(0) + 1e-6).all()


def test_splitting_one_client_in_two_changes_nothing() -> None:
    updates = random_updates(3, seed=2)
    halves = [
        Contribution(f"{u.client}-{part}", u.num_examples, u.load) for u in updates for part in ("x", "y")
    ]
    whole, split = average(SPECS, VALUE, CURRENT, updates), average(SPECS, VALUE, CURRENT, halves)
    for name in whole.tensors:
        np.testing.assert_allclose(split.tensors[name], whole.tensors[name], rtol=1e-6)


def changed(name: str, array: object, dtype: type = np.float32) -> Mapping[str, np.ndarray]:
    return {**tensors([0, 0, 0], [0, 0], [1, 1], 0), name: np.asarray(array, dtype)}


GOOD = changed("n", 1, np.int64)
REFUSED: dict[str, tuple[list[Contribution], str]] = {
    "nobody": ([], "no updates"),
    "a client twice": ([from_client("a", 1, GOOD), from_client("a", 2, GOOD)], "contributes twice"),
    "no windows": ([from_client("a", 0, GOOD)], "at least 1"),
    "negative windows": ([from_client("a", -5, GOOD)], "at least 1"),
    "a negative variance": ([from_client("a", 1, changed("v", [-0.5, 1]))], "variance v is negative"),
    "NaN": ([from_client("a", 1, GOOD), from_client("b", 1, changed("w", [0, np.nan, 0]))], "client b"),
    "infinity": ([from_client("a", 1, changed("v", [np.inf, 0]))], "NaN or infinity"),
    "another shape": ([from_client("a", 1, changed("w", [0, 0]))], "expected float32"),
    "another type": ([from_client("a", 1, changed("w", [0, 0, 0], np.float64))], "expected float32"),
    "a tensor missing": ([from_client("a", 1, {k: v for k, v in GOOD.items() if k != "m"})], "missing"),
    "a tensor too many": ([from_client("a", 1, changed("f", [0, 0]))], "unexpected"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_and_the_current_tensors_are_untouched(what: str) -> None:
    before = {name: array.copy() for name, array in CURRENT.items()}
    updates, reason = REFUSED[what]
    with pytest.raises(AggregationError, match=reason):
        average(SPECS, VALUE, CURRENT, updates)
    for name, array in before.items():
        np.testing.assert_array_equal(CURRENT[name], array)


def test_a_difference_that_makes_a_variance_negative_is_refused() -> None:
    with pytest.raises(AggregationError, match="variance v is negative"):
        average(SPECS, DELTA, CURRENT, [from_client("a", 1, changed("v", [-1.5, 0]))])
    average(SPECS, DELTA, CURRENT, [from_client("a", 1, changed("v", [-1.0, 0]))])


def test_one_negative_variance_costs_its_client_alone_and_names_it() -> None:
    bad = from_client("b", 1000, changed("v", [-1.5, 0]))
    honest = [from_client("a", 1, GOOD), from_client("c", 3, changed("w", [1, 2, 3]))]
    found = average(SPECS, DELTA, CURRENT, [*honest, bad])
    without = average(SPECS, DELTA, CURRENT, honest)
    for name, array in without.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)
    assert (found.mean.clients, found.mean.num_examples) == (("a", "c"), 4)
    (judgement,) = found.mean.evidence
    assert (judgement.client, judgement.verdict, judgement.suspect) == ("b", "refused", True)
    assert without.mean.evidence == ()


def test_a_model_that_is_not_the_plans_is_refused() -> None:
    with pytest.raises(AggregationError, match="not those of the plan"):
        average(SPECS, VALUE, {n: a for n, a in CURRENT.items() if n != "w"}, [from_client("a", 1, GOOD)])


def test_statistics_that_are_not_in_pairs_are_refused() -> None:
    odd = tuple(s for s in SPECS if s.name != "v")
    update = {k: v for k, v in GOOD.items() if k != "v"}
    with pytest.raises(AggregationError, match="in pairs"):
        average(odd, VALUE, CURRENT, [from_client("a", 1, update)])


def test_memory_does_not_grow_with_the_number_of_clients() -> None:
    size = 200_000
    specs = (TensorSpec("w", "float32", (size,), TensorRole.SHARED, TensorGroup.PARAM),)
    current = {"w": np.zeros(size, np.float32)}

    def peak(clients: int) -> int:
        updates = [Contribution(str(i), 1, lambda: {"w": np.ones(size, np.float32)}) for i in range(clients)]
        tracemalloc.start()
        average(specs, VALUE, current, updates)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    assert peak(40) < 1.1 * peak(4)
