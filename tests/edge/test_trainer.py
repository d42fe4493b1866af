"""The device's training engine against NumPy written out by hand, and everything it must refuse."""

from dataclasses import replace

import numpy as np
import pytest
from edge.tiny_graphs import (
    BATCH,
    CONTRACT,
    TENSORS,
    make_plan,
    make_recording,
    reference_logits,
    reference_step,
)
from wearfleet_edge.trainer import (
    Limits,
    TrainingData,
    personal_tensors,
    run_plan,
    start_state,
    upload_tensors,
)
from wearfleet_protos.batching import batches
from wearfleet_protos.errors import DeniedError, IntegrityError, ProtocolError, ShapeError
from wearfleet_protos.plan import Budget, OutputBinding
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, digest_of
from wearfleet_protos.windowing import LabelledWindows, WindowSpec, split_by_time


def _limits(**changes):
    values = {
        "seconds": 60.0,
        "memory_bytes": 1e12,
        "resident_bytes": lambda: 0,
        "monotonic": lambda: 0.0,
        "stopped": lambda: False,
    }
    return Limits(**{**values, **changes})


@pytest.fixture(scope="module")
def data():
    train, holdout = split_by_time([make_recording()], WindowSpec(8, 4, 20.0), 0.5)
    return TrainingData(
        train.select(np.arange(1, len(train))), holdout
    )  # 47 windows: no multiple of the batch


def _run(tiny, data, state=None, **limits):
    start = start_state(tiny.plan, TENSORS, {}) if state is None else state
    return run_plan(tiny.plan, tiny.graphs, start, data, round_number=3, limits=_limits(**limits))


def test_training_equals_the_reference_step_by_step(data):
    tiny = make_plan(epochs=3)
    result = _run(tiny, data)
    tensors, steps = dict(TENSORS), 0
    for rows in batches(tiny.plan.phases[1].loop, tiny.plan.seed, 3, len(data.train)):
        tensors = reference_step(tensors, data.train.x[rows], data.train.y[rows], 0.5)
        steps += 1
    assert len(data.train) % BATCH != 0  # the last batch is short, so padding is part of this law
    assert result.num_steps == steps
    assert result.num_examples == len(data.train)
    for name, wanted in tensors.items():
        np.testing.assert_allclose(result.state[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_metrics_are_sums_over_the_windows_without_padding(data):
    tiny = make_plan()
    metrics = _run(tiny, data).metrics
    said = reference_logits(data.holdout.x).argmax(axis=1)
    assert metrics["evaluate_before/count"] == len(data.holdout)
    assert metrics["evaluate_before/correct"] == (said == data.holdout.y).sum()
    assert metrics["train/count"] == 2 * len(data.train)
    assert metrics["evaluate_after/loss_sum"] < metrics["evaluate_before/loss_sum"]


def test_a_metric_with_reduce_last_keeps_the_last_step(data):
    tiny = make_plan(epochs=2)
    train = tiny.plan.phases[1]
    outputs = tuple(
        OutputBinding(o.output, "metric", "count", "last") if o.target == "count" else o
        for o in train.outputs
    )
    plan = replace(tiny.plan, phases=(replace(train, outputs=outputs),))
    metrics = _run(replace(tiny, plan=plan), data).metrics
    assert metrics["train/count"] == len(data.train) % BATCH


def test_the_arguments_are_left_as_they_were(data):
    tiny = make_plan()
    start = start_state(tiny.plan, TENSORS, {})
    copies = {name: array.copy() for name, array in start.items()}
    _run(tiny, data, start)
    for name, array in copies.items():
        np.testing.assert_array_equal(start[name], array)


def test_the_same_round_twice_gives_the_same_bits(data):
    first, second = _run(make_plan(), data), _run(make_plan(), data)
    for name in first.state:
        np.testing.assert_array_equal(first.state[name], second.state[name])


def test_local_tensors_come_from_the_device_when_it_has_them():
    plan = make_plan().plan
    own = {"norm.mean": np.full(3, 7.0, np.float32)}
    np.testing.assert_array_equal(start_state(plan, TENSORS, own)["norm.mean"], own["norm.mean"])
    np.testing.assert_array_equal(start_state(plan, TENSORS, {})["norm.mean"], TENSORS["norm.mean"])


def test_zeros_and_copies_start_as_the_plan_says():
    tiny = make_plan()
    weight = next(t for t in tiny.plan.tensors if t.name == "head.weight")
    slots = (
        replace(weight, name="momentum", group=TensorGroup.OPTIMISER, origin="zeros"),
        replace(weight, name="anchor", group=TensorGroup.ANCHOR, origin="copy", copy_of="head.weight"),
    )
    state = start_state(replace(tiny.plan, tensors=(*tiny.plan.tensors, *slots)), TENSORS, {})
    np.testing.assert_array_equal(state["momentum"], np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(state["anchor"], TENSORS["head.weight"])
    assert state["anchor"] is not state["head.weight"]


def test_a_limit_clears_what_is_beyond_it_and_nothing_else():
    plan = make_plan().plan
    ranks = TensorSpec("ranks", "float32", (4,), TensorRole.LORA_RANK, TensorGroup.AUX, "ones")
    others = replace(ranks, name="others", role=TensorRole.AUX)
    plan = replace(plan, tensors=(*plan.tensors, ranks, others))
    for limit, expected in ((1, [1, 0, 0, 0]), (3, [1, 1, 1, 0]), (4, [1, 1, 1, 1]), (9, [1, 1, 1, 1])):
        state = start_state(plan, TENSORS, {}, max_lora_rank=limit)
        assert state["ranks"].tolist() == expected
        assert state["others"].tolist() == [1, 1, 1, 1]
        assert state["ranks"].dtype == np.float32
    assert start_state(plan, TENSORS, {})["ranks"].tolist() == [1, 1, 1, 1]


def test_update_holds_the_difference_of_uploaded_roles_only(data):
    tiny = make_plan(local_norms=True)
    start = start_state(tiny.plan, TENSORS, {})
    result = _run(tiny, data, start)
    update = upload_tensors(tiny.plan, start, result.state)
    assert sorted(update) == ["head.bias", "head.weight", "norm.count"]
    np.testing.assert_array_equal(update["head.bias"], result.state["head.bias"] - start["head.bias"])
    by_value = replace(tiny.plan, upload=replace(tiny.plan.upload, form="value"))
    np.testing.assert_array_equal(
        upload_tensors(by_value, start, result.state)["head.bias"], result.state["head.bias"]
    )


def test_personal_tensors_are_parameters_and_buffers(data):
    tiny = make_plan()
    assert personal_tensors(tiny.plan, _run(tiny, data).state).keys() == TENSORS.keys()


def test_diverged_training_is_refused(data):
    with pytest.raises(ShapeError, match="NaN or infinity"):
        _run(make_plan(lr=float("inf")), data)


def test_tampered_graph_is_refused(data):
    tiny = make_plan()
    graphs = {digest: bytes([*graph[:-1], graph[-1] ^ 1]) for digest, graph in tiny.graphs.items()}
    with pytest.raises(IntegrityError, match="not the one that the plan names"):
        _run(replace(tiny, graphs=graphs), data)


def test_graph_with_a_forbidden_operator_is_refused_though_its_digest_is_right(data):
    bad = make_plan().graphs[make_plan().plan.phases[1].graph].replace(b"LogSoftmax", b"RandomNorm")
    tiny = make_plan(graph=bad)
    with pytest.raises(IntegrityError, match="allow-list"):
        _run(tiny, data)


def test_graph_that_does_not_fit_the_plan_is_refused(data):
    tiny = make_plan()
    train = tiny.plan.phases[1]
    wrong = replace(train, inputs=tuple(b for b in train.inputs if b.input != "lr"))
    with pytest.raises(ProtocolError, match="'lr'"):
        _run(replace(tiny, plan=replace(tiny.plan, phases=(wrong,))), data)
    shape = tuple(replace(t, shape=(2, 4)) if t.name == "head.weight" else t for t in tiny.plan.tensors)
    start = {**TENSORS, "head.weight": np.zeros((2, 4), np.float32)}
    with pytest.raises(ProtocolError, match=r"head\.weight"):
        _run(replace(tiny, plan=replace(tiny.plan, tensors=shape)), data, start)


def test_too_few_windows_are_declined(data):
    tiny = make_plan(budget=Budget(60.0, 1 << 20, len(data.train) + 1))
    with pytest.raises(DeniedError, match=f"here are {len(data.train)}"):
        _run(tiny, data)


def test_computation_stops_at_the_plans_time_budget(data):
    seconds = iter(range(1000))
    with pytest.raises(DeniedError, match="longer than the 5 s"):
        _run(make_plan(budget=Budget(5.0, 1 << 20, 2)), data, monotonic=lambda: float(next(seconds)))


def test_computation_stops_at_the_devices_own_limits(data):
    seconds = iter(range(1000))
    with pytest.raises(DeniedError, match="longer than the 3 s"):
        _run(make_plan(), data, seconds=3.0, monotonic=lambda: float(next(seconds)))
    with pytest.raises(DeniedError, match="memory"):
        _run(make_plan(), data, memory_bytes=1e6, resident_bytes=lambda: 2_000_000)
    with pytest.raises(DeniedError, match="stopping"):
        _run(make_plan(), data, stopped=lambda: True)


def test_an_empty_holdout_counts_nothing(data):
    empty = LabelledWindows(
        np.empty((0, 3, CONTRACT.window), np.float32),
        np.empty(0, np.int64),
        np.empty(0, np.int64),
        np.empty(0, np.int64),
    )
    metrics = _run(make_plan(), TrainingData(data.train, empty)).metrics
    assert metrics["evaluate_before/count"] == 0.0
    assert metrics["train/count"] > 0


def test_plan_graph_digests_are_those_of_the_bytes():
    tiny = make_plan()
    assert {digest_of(graph) for graph in tiny.graphs.values()} == {p.graph for p in tiny.plan.phases}
