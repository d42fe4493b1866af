"""A device in a federated run: every way a task can end, and what is left on disk after each."""

from dataclasses import replace

import numpy as np
import pytest
from edge.device_bench import Bench
from edge.simulators import Signer
from edge.tiny_graphs import CONTRACT, TENSORS, make_plan
from wearfleet_edge.transport.cloud import Receipt, ReceiptStatus, Stage
from wearfleet_edge.wearer import Wearer
from wearfleet_protos.errors import ConflictError, TransportError
from wearfleet_protos.plan import Budget, UploadSpec
from wearfleet_protos.tensors import (
    NO_RANK_LIMIT,
    TensorGroup,
    TensorRole,
    TensorSpec,
    decode_tensors,
    digest_of,
    tensor_metadata,
)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_a_round_is_trained_uploaded_submitted_and_its_local_tensors_kept(bench):
    task = bench.offer()
    bench.worker.step()
    (submission,) = bench.cloud.submissions
    update = decode_tensors(bench.cloud.blobs[submission.update_digest], make_plan().plan.upload_specs())
    assert np.abs(update["head.weight"]).max() > 0
    assert submission.attempt_id == task.attempt_id
    assert submission.base_digest == task.tensors_digest
    assert submission.num_examples == len(bench.wearer.training_data(CONTRACT).train)
    assert submission.metrics["base/correct"] == 3.0
    assert submission.metrics["evaluate_after/loss_sum"] < submission.metrics["evaluate_before/loss_sum"]
    assert [stage for _, stage in bench.cloud.stages] == [Stage.FETCHED, Stage.TRAINING]
    assert np.abs(bench.kept()["norm.mean"]).max() > 0
    assert bench.local.pending() is None
    assert bench.worker.progress.rounds == 1


def test_the_next_round_starts_from_the_kept_local_tensors(bench):
    bench.offer()
    bench.worker.step()
    kept = bench.kept()["norm.mean"].copy()
    bench.offer(round_number=2)
    bench.worker.step()
    first, second = bench.cloud.submissions
    assert second.metrics["evaluate_before/loss_sum"] != first.metrics["evaluate_before/loss_sum"]
    assert not np.array_equal(bench.kept()["norm.mean"], kept)
    assert not second.local_state_reset


def test_a_device_starts_from_no_higher_rank_than_it_allows(bench):
    tiny = make_plan()
    ranks = TensorSpec("ranks", "float32", (4,), TensorRole.LORA_RANK, TensorGroup.AUX, "ones")
    upload = UploadSpec((TensorRole.LORA_RANK,), (TensorGroup.AUX,), "value")
    tiny = replace(tiny, plan=replace(tiny.plan, tensors=(*tiny.plan.tensors, ranks), upload=upload))
    found = []
    for number, limit in enumerate((3, NO_RANK_LIMIT), start=1):
        bench.worker._device = replace(bench.worker._device, max_lora_rank=limit)
        bench.offer(tiny, round_number=number)
        bench.worker.step()
        sent = bench.cloud.blobs[bench.cloud.submissions[-1].update_digest]
        found.append(decode_tensors(sent, tiny.plan.upload_specs())["ranks"].tolist())
    assert found == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_damaged_local_tensors_are_reported_as_reset(bench):
    bench.offer()
    bench.worker.step()
    for path in (bench.state.federated / "runs").iterdir():
        path.write_bytes(b"damaged")
    bench.offer(round_number=2)
    bench.worker.step()
    assert bench.cloud.submissions[1].local_state_reset


@pytest.mark.parametrize("broken", ["submit", "submit_reply"])
def test_a_break_while_handing_in_repeats_the_same_attempt_after_a_restart(bench, broken):
    bench.offer()
    bench.cloud.broken = {broken}
    with pytest.raises(TransportError):
        bench.worker.step()
    assert bench.kept() == {}  # nothing is promoted before the receipt
    pending = bench.local.pending()
    bench.cloud.broken = set()
    bench.cloud.receipt = Receipt(ReceiptStatus.DUPLICATE, "")
    bench.restart()
    bench.worker.step()
    last = bench.cloud.submissions[-1]
    assert last == pending.submission
    assert last.update_digest in bench.cloud.blobs
    assert np.abs(bench.kept()["norm.mean"]).max() > 0
    assert bench.local.pending() is None


def test_a_break_between_promotion_and_forgetting_promotes_again(bench):
    bench.offer()
    bench.cloud.broken = {"submit"}
    with pytest.raises(TransportError):
        bench.worker.step()
    result = bench.local.pending()
    bench.local.promote(result)
    kept = bench.kept()["norm.mean"].copy()
    bench.local.save(result)  # as if the deletion had not reached the disk
    bench.cloud.broken = set()
    bench.restart()
    bench.worker.step()
    np.testing.assert_array_equal(bench.kept()["norm.mean"], kept)


@pytest.mark.parametrize("status", [ReceiptStatus.STALE, ReceiptStatus.REJECTED])
def test_a_result_that_does_not_count_leaves_no_trace(bench, status):
    bench.offer()
    bench.cloud.receipt = Receipt(status, "too late")
    bench.worker.step()
    assert bench.kept() == {}
    assert bench.local.pending() is None
    assert bench.worker.progress.rounds == 0
    assert "too late" in bench.worker.progress.last_error


def test_a_refused_submission_is_forgotten_and_not_repeated(bench, monkeypatch):
    bench.offer()

    def refuse(*_):
        raise ConflictError("round closed")

    monkeypatch.setattr(bench.cloud, "submit", refuse)
    bench.worker.step()
    assert bench.local.pending() is None
    assert bench.worker.step() >= 2.0  # the same attempt is not computed again
    assert len(bench.cloud.stages) == 2


def _wrong_schema(tiny):
    return replace(tiny, plan=replace(tiny.plan, model_schema_hash=digest_of(b"other")))


def _wrong_contract(tiny):
    return replace(tiny, plan=replace(tiny.plan, contract=replace(CONTRACT, rate_hz=50.0)))


REFUSALS = {
    "another model": (_wrong_schema, "schema"),
    "another contract": (_wrong_contract, "other channels"),
    "too many bytes": (lambda t: replace(t, plan=replace(t.plan, budget=Budget(60.0, 10, 2))), "bytes"),
    "too few windows": (
        lambda t: replace(t, plan=replace(t.plan, budget=Budget(60.0, 1 << 20, 10_000))),
        "windows",
    ),
    "diverges": (lambda _: make_plan(lr=3e38), "NaN"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_plan_this_device_cannot_run_is_declined_with_its_reason(bench, case):
    change, words = REFUSALS[case]
    bench.offer(
        change(make_plan()), tensors={**TENSORS, "head.weight": TENSORS["head.weight"] * np.float32(10)}
    )
    bench.worker.step()
    ((attempt, reason),) = bench.cloud.declined
    assert attempt == "attempt-1"
    assert words in reason
    assert bench.cloud.submissions == []
    assert bench.local.pending() is None


def test_a_model_that_comes_while_the_device_waits_for_a_task_is_the_one_that_learns(bench, monkeypatch):
    bench.offer()
    new, poll = bench.active.installed, bench.cloud.poll_task
    other = make_plan().plan.tensors[:1]
    bench.active._installed = replace(new, manifest=replace(new.manifest, tensors=other))

    def poll_while_the_model_comes(*given):
        bench.active.use(new, None)
        return poll(*given)

    monkeypatch.setattr(bench.cloud, "poll_task", poll_while_the_model_comes)
    bench.worker.step()
    assert bench.cloud.declined == []
    assert len(bench.cloud.submissions) == 1


def test_a_plan_signed_by_another_key_is_declined(bench):
    bench.offer(signer=Signer())
    bench.worker.step()
    assert "unknown key" in bench.cloud.declined[0][1]


def test_a_tampered_plan_is_declined(bench):
    task = bench.offer()
    data = bytearray(bench.cloud.blobs[task.plan_digest])
    data[60] ^= 1
    bench.cloud.blobs[task.plan_digest] = bytes(data)
    bench.worker.step()
    assert "damaged or tampered" in bench.cloud.declined[0][1]
    assert list((bench.state.artifacts / "plans").iterdir()) == []


def test_downloaded_tensors_with_nan_or_another_shape_are_declined(bench):
    bench.offer(tensors={**TENSORS, "head.bias": np.array([np.nan, 0], np.float32)})
    bench.worker.step()
    bench.offer(tensors={**TENSORS, "head.bias": np.zeros(5, np.float32)}, round_number=2)
    bench.worker.step()
    assert "NaN" in bench.cloud.declined[0][1]
    assert "head.bias" in bench.cloud.declined[1][1]


def test_a_stop_in_mid_training_leaves_the_task_to_the_server(bench):
    bench.offer()
    bench.stopping = True
    bench.worker.step()
    assert bench.cloud.declined == []
    assert bench.cloud.submissions == []
    bench.stopping = False
    bench.restart()
    bench.worker.step()
    assert len(bench.cloud.submissions) == 1


def test_a_download_that_breaks_again_and_again_goes_on_where_it_stopped(bench):
    bench.offer()
    bench.cloud.cut_after = 700
    for _ in range(20):
        try:
            bench.worker.step()
            break
        except TransportError:
            continue
    assert len(bench.cloud.submissions) == 1


def test_personalisation_keeps_the_result_here_and_puts_it_to_use(bench):
    before = bench.active.recogniser.evaluate(bench.wearer.training_data(CONTRACT).holdout)
    wrong = {**TENSORS, "head.weight": -TENSORS["head.weight"]}
    bench.offer(make_plan(epochs=10), personalise=True, round_number=6, tensors=wrong)
    bench.worker.step()
    (submission,) = bench.cloud.submissions
    assert submission.update_digest == ""
    assert submission.metrics["personal/count"] == before.count
    recogniser = bench.active.recogniser
    assert recogniser.personalised
    after = recogniser.evaluate(bench.wearer.training_data(CONTRACT).holdout)
    assert (
        after.correct
        == submission.metrics["personal/correct"]
        == submission.metrics["evaluate_after/correct"]
    )
    metadata = tensor_metadata(bench.state.personal.read_bytes())
    assert metadata["manifest_digest"] == bench.active.installed.manifest_digest
    assert metadata["round"] == "6"
    scores = recogniser.ood_scores(bench.wearer.training_data(CONTRACT).train.x)
    assert (scores > recogniser.ood_threshold).mean() == pytest.approx(0.05, abs=1.5 / len(scores))


def test_personal_tensors_of_another_release_are_not_laid_over_this_one(bench):
    bench.offer(personalise=True)
    bench.worker.step()
    assert bench.local.personal(bench.active.installed.manifest_digest) is not None
    assert bench.local.personal(digest_of(b"another release")) is None


def test_without_a_model_no_task_is_asked_for(bench):
    bench.active._installed = None
    bench.cloud.broken = {"poll_task"}
    assert bench.worker.step() > 0


def test_without_recordings_the_task_is_declined(bench):
    bench.wearer = Wearer((), (), 0.5)
    bench.restart()
    bench.offer()
    bench.worker.step()
    assert "no recorded windows" in bench.cloud.declined[0][1]
