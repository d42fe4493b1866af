"""Robust rules: equal to slow oracles, identities, what attackers cannot do, first checks, evidence, and memory."""

import json
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import robust_rules as oracle
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Arrays, Averaging, Contribution, Mean
from wearfleet_cloud.federated.robust import rules, stack
from wearfleet_cloud.federated.robust.fold import fold_robustly
from wearfleet_cloud.federated.robust.options import TooFewUpdatesError
from wearfleet_cloud.federated.round import Round, RoundPolicy, RoundState, advance
from wearfleet_cloud.federated.round_events import Aggregated, AggregationFailed
from wearfleet_protos.errors import AggregationError, ConfigError, ProtocolError
from wearfleet_protos.plan import UploadSpec
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, digest_of

GROUPS = (TensorGroup.PARAM, TensorGroup.BUFFER)
ROLES = (TensorRole.SHARED, TensorRole.HEAD, TensorRole.NORM_STAT, TensorRole.COUNTER)
WIDTH = 7
SPECS = (
    TensorSpec("w", "float32", (2, 2), TensorRole.SHARED, TensorGroup.PARAM),
    TensorSpec("m", "float32", (2,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
    TensorSpec("v", "float32", (2,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
    TensorSpec("n", "int64", (), TensorRole.COUNTER, TensorGroup.BUFFER),
    TensorSpec("h", "float32", (3,), TensorRole.HEAD, TensorGroup.PARAM),
)
DELTA = UploadSpec(ROLES, GROUPS, "delta", "float32")
CURRENT: Arrays = {
    "w": np.zeros((2, 2), np.float32),
    "m": np.zeros(2, np.float32),
    "v": np.ones(2, np.float32),
    "n": np.asarray(3, np.int64),
    "h": np.zeros(3, np.float32),
}
ROUNDING = 2.0**-22
"""Rows are float32 (2^-24 of the largest value), and so is a kernel's result; two more for sums of results."""

RULES: dict[str, tuple[dict[str, object], Callable[[oracle.Rows], oracle.Numbers]]] = {
    "krum": ({"attackers": 2}, lambda rows: oracle.krum(rows, 2)),
    "multi-krum": (
        {"attackers": 2},
        lambda rows: oracle.multi_krum(rows, 2, max(1, len(rows) - 7)),
    ),
    "trimmed-mean": ({"attackers": 2, "trim": 0.3}, lambda rows: oracle.trimmed_mean(rows, 0.3)),
    "median": ({"attackers": 2}, oracle.median),
    "bulyan": ({"attackers": 2}, lambda rows: oracle.bulyan(rows, 2)),
    "geometric-median": ({"attackers": 2}, oracle.geometric_median),
    "norm-bound": ({"attackers": 2}, lambda rows: oracle.norm_bound(rows, 0.0)),
    "centred-clipping": (
        {"attackers": 2},
        lambda rows: oracle.centred_clipping(rows, [0.0] * WIDTH, 0.0),
    ),
}


def averaging(rule: str, **options: object) -> Averaging:
    return Averaging(rule=rule, **{**RULES[rule][0], **options})


def update(row: Sequence[float]) -> Arrays:
    trained = np.asarray(row, np.float32)
    return {
        "w": trained[:4].reshape(2, 2),
        "m": np.full(2, trained[0]),
        "v": np.abs(np.full(2, trained[1])),
        "n": np.asarray(4, np.int64),
        "h": trained[4:],
    }


def sent(rows: Sequence[Sequence[float]] | np.ndarray, **changed: Contribution) -> list[Contribution]:
    """From c00, c01, ...; ``changed`` replaces clients by name."""
    made = {
        f"c{i:02d}": Contribution(f"c{i:02d}", 1 + 7 * i, lambda row=row: update(row))  # type: ignore[misc]
        for i, row in enumerate(rows)
    }
    return [*{**made, **changed}.values()]


def combine(rule: Averaging, contributions: Sequence[Contribution]) -> Mean:
    return rule.combine(SPECS, DELTA, CURRENT, contributions)


def trained(mean: Mean) -> np.ndarray:
    return np.concatenate([mean.values["w"].reshape(-1), mean.values["h"]])


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 0.5, (count, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("count", [11, 12, 17])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_oracle(rule: str, count: int) -> None:
    rows = normal(count, seed=count)
    expected = RULES[rule][1](rows.astype(np.float64).tolist())
    found = trained(combine(averaging(rule), sent(rows)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * 4)


@given(st.integers(3, 9), st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_bulyan_averages_the_nearest_values(count: int, kept: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(count, 3)).tolist()
    found = rules._nearest_mean(torch.tensor(rows, dtype=torch.float64), min(kept, count))
    np.testing.assert_allclose(found.numpy(), oracle.bulyan_all_nearest(rows, min(kept, count)), atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("trimmed-mean", {"trim": 0.0}),
        ("norm-bound", {"bound": 1e6}),
        ("centred-clipping", {"bound": 1e6}),
        ("multi-krum", {"attackers": 1, "selected": 11}),
    ],
)
def test_a_rule_that_leaves_nothing_out_is_the_uniform_mean(rule: str, options: dict[str, object]) -> None:
    rows = normal(12)
    if rule == "multi-krum":  # m - f of them: with its farthest one away, the rest are the others' mean
        rows[3] = 3.0
    plain = combine(Averaging("uniform"), sent(np.delete(rows, 3, 0) if rule == "multi-krum" else rows))
    found = combine(Averaging(rule=rule, **options), sent(rows))
    np.testing.assert_allclose(trained(found), trained(plain), rtol=0, atol=ROUNDING * 4)


@pytest.mark.parametrize("rule", RULES)
def test_equal_updates_return_themselves(rule: str) -> None:
    row = normal(1)[0]
    found = combine(averaging(rule), sent([row] * 12))
    np.testing.assert_allclose(trained(found), row, rtol=ROUNDING)
    assert {j.verdict for j in found.evidence} <= {"counted", "left out"}
    assert not any(j.suspect for j in found.evidence)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_arrival_changes_nothing_and_claimed_windows_neither(rule: str) -> None:
    contributions = sent(normal(12))
    inflated = [replace(c, num_examples=10**9 if i == 5 else 1) for i, c in enumerate(contributions)]
    one, other = (combine(averaging(rule), c) for c in (contributions, inflated[::-1]))
    for name, value in one.values.items():
        np.testing.assert_array_equal(other.values[name], value)
    assert one.evidence == other.evidence


@pytest.mark.parametrize("attack", [8.0, -8.0])
@pytest.mark.parametrize("rule", RULES)
def test_two_of_twelve_cannot_carry_the_aggregate_off(rule: str, attack: float) -> None:
    rows = normal(12)
    honest = rows[2:]
    rows[:2] = attack
    found = trained(combine(averaging(rule), sent(rows)))
    plain = trained(combine(Averaging("uniform"), sent(rows)))
    if rule in ("trimmed-mean", "median", "krum", "multi-krum", "bulyan"):
        assert (found >= honest.min(0) - ROUNDING * 2).all()
        assert (found <= honest.max(0) + ROUNDING * 2).all()
    # clipping bounds a client by the median length, so two of twelve move the mean by at most a sixth of about twice it
    assert np.linalg.norm(found - honest.mean(0)) < 0.5 * np.linalg.norm(plain - honest.mean(0))


@given(st.integers(0, 1000), st.floats(-1e4, 1e4))
@settings(max_examples=25, deadline=None)
def test_one_attacker_cannot_move_the_median_out_of_the_honest_range(seed: int, value: float) -> None:
    rows = normal(5, seed)
    rows[4, 2] = value
    found = trained(combine(averaging("median", attackers=1), sent(rows)))
    assert (found >= rows[:4].min(0) - ROUNDING).all()
    assert (found <= rows[:4].max(0) + ROUNDING).all()


@pytest.mark.parametrize("rule", RULES)
def test_statistics_are_medians_and_counters_the_largest(rule: str) -> None:
    rows = normal(12)
    liar = {**update(rows[0]), "m": np.full(2, 1e30, np.float32), "n": np.asarray(9, np.int64)}
    found = combine(averaging(rule), sent(rows, c00=Contribution("c00", 1, lambda: liar)))
    sent_means = [float(np.float32(row[0])) for row in rows[1:]] + [1e30]
    np.testing.assert_allclose(found.values["m"], oracle.middle(sent_means), rtol=ROUNDING)
    assert found.values["n"] == 9
    assert found.values["n"].dtype == np.int64


LEAST = {"krum": 7, "multi-krum": 7, "bulyan": 11, "trimmed-mean": 7, "median": 5, "geometric-median": 5,
         "norm-bound": 5, "centred-clipping": 5}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_round_with_too_few_updates_is_skipped(rule: str) -> None:
    combine(averaging(rule), sent(normal(LEAST[rule])))
    with pytest.raises(AggregationError, match=r"the round is\s+skipped"):
        combine(averaging(rule), sent(normal(LEAST[rule] - 1)))


def test_refused_updates_do_not_lower_the_bound() -> None:
    rows = normal(7)
    rows[2, 3] = np.nan
    with pytest.raises(AggregationError, match="needs at least 7 updates, 6 are left"):
        combine(averaging("krum"), sent(rows))


def test_more_selected_than_may_be_honest_is_skipped() -> None:
    with pytest.raises(AggregationError, match="cannot take 11 of 12"):
        combine(averaging("multi-krum", selected=11), sent(normal(12)))


BAD: dict[str, tuple[Callable[[], Arrays], str]] = {
    "nan": (lambda: update([np.nan] * WIDTH), "NaN or infinity"),
    "infinite": (lambda: update([np.inf] * WIDTH), "NaN or infinity"),
    "shape": (lambda: {**update([1.0] * WIDTH), "w": np.zeros(4, np.float32)}, "expected float32"),
    "missing": (lambda: {"w": np.zeros((2, 2), np.float32)}, "missing"),
    "negative variance": (lambda: {**update([1.0] * WIDTH), "v": np.full(2, -1.5, np.float32)}, "negative"),
    "counter": (lambda: {**update([1.0] * WIDTH), "n": np.asarray(2**62)}, "counter n holds"),
    "long": (lambda: update([1e3] * WIDTH), "times the running median"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_used_is_refused_and_named(kind: str, rule: str) -> None:
    rows = normal(12)
    found = combine(averaging(rule), sent(rows, c05=Contribution("c05", 1, BAD[kind][0])))
    without = combine(averaging(rule), [c for c in sent(rows) if c.client != "c05"])
    np.testing.assert_array_equal(trained(found), trained(without))
    (judgement,) = [j for j in found.evidence if j.client == "c05"]
    assert (judgement.verdict, judgement.suspect) == ("refused", True)
    assert BAD[kind][1] in judgement.reason
    assert "c05" not in found.clients


def test_nobody_left_is_an_error_that_says_why() -> None:
    with pytest.raises(
        AggregationError, match="no update of the round can be used, 3 were refused; the first: c00"
    ):
        combine(averaging("median"), sent(np.full((3, WIDTH), np.nan)))


def test_a_client_counts_once() -> None:
    with pytest.raises(AggregationError, match="c01 contributes twice"):
        combine(averaging("median"), [*sent(normal(12)), sent(normal(2))[1]])


def test_evidence_says_what_became_of_whom() -> None:
    rows = normal(12)
    rows[7] = 9.0
    by_rule = {rule: {j.client: j for j in combine(averaging(rule), sent(rows)).evidence} for rule in RULES}
    for rule, found in by_rule.items():
        assert list(found) == [f"c{i:02d}" for i in range(12)]
        assert found["c07"].suspect, rule
        assert "times the median distance" in found["c07"].reason
        assert [c for c, j in found.items() if j.suspect] == ["c07"], rule
        assert found["c07"].norm == pytest.approx(9.0 * WIDTH**0.5)
    assert by_rule["krum"]["c07"].verdict == by_rule["bulyan"]["c07"].verdict == "left out"
    assert by_rule["norm-bound"]["c07"].verdict == by_rule["centred-clipping"]["c07"].verdict == "clipped"
    assert by_rule["norm-bound"]["c07"].score < 0.5
    assert sum(j.verdict == "counted" for j in by_rule["krum"].values()) == 1
    assert by_rule["krum"]["c07"].score == max(j.score for j in by_rule["krum"].values())


def test_buckets_are_means_and_blame_their_members() -> None:
    rows = normal(12)
    rows[7] = 9.0
    alone = combine(averaging("krum", attackers=1), sent(rows))
    found = combine(averaging("krum", attackers=1, bucket=2), sent(rows))
    halves = [np.mean(rows[[i, j]], axis=0) for i in range(12) for j in range(i)]
    assert min(np.abs(trained(found) - half).max() for half in halves) < ROUNDING * 2
    assert not np.array_equal(trained(found), trained(alone))
    counted = [j.client for j in found.evidence if j.verdict == "counted"]
    assert len(counted) == 2
    assert "c07" not in counted
    assert all("a bucket of 2" in j.reason for j in found.evidence if j.verdict == "left out")
    with pytest.raises(AggregationError, match="needs at least 5 updates, 4 are left"):
        combine(averaging("krum", attackers=1, bucket=3), sent(rows))


def test_the_same_updates_give_the_same_buckets_and_others_others() -> None:
    rule = averaging("median", bucket=2)
    one, again = (combine(rule, sent(normal(12))[:: 1 - 2 * back]) for back in (0, 1))
    np.testing.assert_array_equal(trained(one), trained(again))


def rounds(rule: str, *sizes: float) -> list[Mean]:
    """Rounds whose updates have these lengths, one after the other."""
    strategy = create_strategy("fedavg", {"rule": rule, "attackers": 2})
    state: Arrays = {}
    made = []
    for size in sizes:
        averaged = fold_robustly(strategy, SPECS, CURRENT, state, sent(normal(12) * size))
        state = averaged.state
        made.append(averaged.mean)
    return made


def test_the_running_median_outlives_a_round() -> None:
    last = rounds("median", 1.0, 1.1, 0.9, 1.0)[-1]
    assert last.memory["norms"].shape == (4,)
    strategy = create_strategy("fedavg", {"rule": "median", "attackers": 2})
    state = {f"robust/{name}": array for name, array in last.memory.items()}
    with pytest.raises(AggregationError, match="12 were refused"):  # all of them 30 times as long as ever
        fold_robustly(strategy, SPECS, CURRENT, state, sent(normal(12) * 30))
    fold_robustly(strategy, SPECS, CURRENT, {}, sent(normal(12) * 30))


def test_the_centre_of_clipping_is_the_last_aggregate() -> None:
    first, second = rounds("centred-clipping", 1.0, 0.5)
    rows = (normal(12) * np.float32(0.5)).astype(np.float64).tolist()
    expected = oracle.centred_clipping(rows, trained(first).tolist(), 0.0)
    np.testing.assert_allclose(trained(second), expected, rtol=0, atol=ROUNDING * 4)


def test_a_server_optimiser_and_a_rule_keep_their_states_apart() -> None:
    options = {"rule": "trimmed-mean", "attackers": 2, "server_momentum": 0.5}
    strategy = create_strategy("fedavgm", options)
    first = fold_robustly(strategy, SPECS, CURRENT, {}, sent(normal(12)))
    assert {name.split("/")[0] for name in first.state} > {"robust"}
    second = fold_robustly(strategy, SPECS, CURRENT, first.state, sent(normal(12)))
    assert second.state.keys() == first.state.keys()
    assert second.state["robust/norms"].shape == (2,)
    step = np.asarray(second.tensors["w"], np.float64)
    np.testing.assert_allclose(step, 1.5 * np.asarray(first.tensors["w"]), rtol=1e-5)


def test_fednova_does_not_believe_how_many_steps_a_client_says_it_made() -> None:
    strategy = create_strategy("fednova", {"rule": "median", "attackers": 2})
    honest = [replace(c, num_steps=5) for c in sent(normal(12))]
    lying = [replace(c, num_steps=10**9) if c.client == "c03" else c for c in honest]
    plain = create_strategy("fedavg", {"rule": "median", "attackers": 2})
    expected = fold_robustly(plain, SPECS, CURRENT, {}, honest).tensors["w"]
    np.testing.assert_allclose(
        fold_robustly(strategy, SPECS, CURRENT, {}, honest).tensors["w"], expected, rtol=1e-6
    )
    found = np.asarray(fold_robustly(strategy, SPECS, CURRENT, {}, lying).tensors["w"], np.float64)
    assert np.abs(found - expected).max() < np.abs(expected).max()


def test_without_a_rule_nothing_is_kept() -> None:
    strategy = create_strategy("fedavg", {})
    averaged = fold_robustly(strategy, SPECS, CURRENT, {}, sent(normal(3)))
    assert averaged.state == {}
    assert averaged.mean.evidence == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "mode"}, "unknown rule 'mode'; known: mean, krum"),
        ({"rule": "krum"}, "set attackers to at least 1"),
        ({"attackers": 2}, "rule mean does not use attackers"),
        ({"rule": "median", "trim": 0.1}, "does not use trim"),
        ({"rule": "krum", "attackers": 1, "selected": 3}, "does not use selected"),
        ({"rule": "median", "bound": 1.0}, "does not use bound"),
        ({"bucket": 2}, "does not use bucket"),
        ({"rule": "trimmed-mean", "trim": 0.5}, "trim at least 0 and below 0.5"),
        ({"rule": "median", "bucket": 0}, "bucket at least 1"),
        ({"rule": "median", "memory": "x"}, "unknown option 'memory'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_strategy("fedavg", options)


def test_scaffold_and_a_rule_are_refused_when_the_job_is_made() -> None:
    with pytest.raises(ConfigError, match="scaffold cannot be combined with robust"):
        create_strategy("scaffold", {"rule": "median"})


def test_a_matrix_in_a_file_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = (averaging("bulyan"), averaging("median", bucket=2))
    inside = [combine(rule, sent(normal(12))) for rule in tried]
    monkeypatch.setattr(stack, "_IN_MEMORY", 0)
    for rule, before in zip(tried, inside, strict=True):
        np.testing.assert_array_equal(trained(combine(rule, sent(normal(12)))), trained(before))


@pytest.mark.parametrize("rule", ["median", "krum", "norm-bound"])
def test_memory_is_a_few_models_when_the_matrix_lies_in_a_file(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "_IN_MEMORY", 0)
    size, count = 200_000, 24
    specs = (TensorSpec("w", "float32", (size,), TensorRole.SHARED, TensorGroup.PARAM),)
    generator = np.random.default_rng(0)

    def from_client(i: int) -> Contribution:
        return Contribution(f"c{i:02d}", 1, lambda: {"w": generator.normal(size=size).astype(np.float32)})

    averaging(rule).combine(
        specs, DELTA, {"w": np.zeros(size, np.float32)}, [from_client(i) for i in range(7)]
    )
    tracemalloc.start()
    averaging(rule).combine(
        specs, DELTA, {"w": np.zeros(size, np.float32)}, [from_client(i) for i in range(count)]
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # an update as float64 and float32, the result, and finite checks; 24 updates would be 19.2 MB
    assert peak < 5 * size * 8


def test_evidence_is_stored_with_the_round_and_rounds_from_before_have_none() -> None:
    rows = normal(12)
    rows[7] = 9.0
    judged = tuple(j for j in combine(averaging("krum"), sent(rows)).evidence if j.noted)
    assert len(judged) == 11  # all but the one that Krum chose
    current = Round("run", 1, digest_of(b""), RoundPolicy(), state=RoundState.AGGREGATING)
    after, _ = advance(current, Aggregated(digest_of(b"x"), judged=judged), 0.0)
    stored = json.loads(json.dumps(after.to_dict()))
    assert Round.from_dict(stored) == after
    assert after.judged == judged
    assert Round.from_dict({name: value for name, value in stored.items() if name != "judged"}).judged == ()
    with pytest.raises(ProtocolError, match="judgement"):
        Round.from_dict({**stored, "judged": [{"who": "anna"}]})


def test_a_skipped_round_keeps_the_evidence_too() -> None:
    rows = normal(7)
    rows[2, 3] = np.nan
    with pytest.raises(TooFewUpdatesError) as caught:
        combine(averaging("krum"), sent(rows))
    assert [j.client for j in caught.value.refused] == ["c02"]
    current = Round("run", 1, digest_of(b""), RoundPolicy(), state=RoundState.AGGREGATING)
    after, _ = advance(current, AggregationFailed("too few", caught.value.refused), 0.0)
    assert (after.state, [j.client for j in after.judged]) == (RoundState.SKIPPED, ["c02"])
