"""Codecs of updates on a device: what it sends, and what it owes after every way in which a round can end."""

from dataclasses import replace

import numpy as np
import pytest
from edge.device_bench import Bench
from edge.tiny_graphs import TENSORS, WIDE, WIDE_STEP, make_plan
from wearfleet_edge.transport.cloud import Receipt, ReceiptStatus
from wearfleet_protos.codecs import UpdateCodec
from wearfleet_protos.errors import ConflictError, ProtocolError, TransportError
from wearfleet_protos.plan import Plan

TOPK = UpdateCodec("topk", fraction=0.1)
PLAN = make_plan(codec=TOPK).plan
START = {**TENSORS, WIDE.name: np.zeros(WIDE.shape, np.float32)}


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def offer(bench, round_number=1, codec=TOPK):
    return bench.offer(make_plan(codec=codec), round_number=round_number, tensors=START)


def arrived(bench, codec=TOPK):
    """The last update as the service decodes it."""
    submission = bench.cloud.submissions[-1]
    plan = make_plan(codec=codec).plan
    return plan.update_format().decode(bench.cloud.blobs[submission.update_digest])


def trained(bench):
    """What a round moves the wide tensor by, in float32 as the graph adds it."""
    count = len(bench.wearer.training_data(PLAN.contract).train)
    total = np.zeros(WIDE.shape, np.float32)
    for _ in range(2 * -(-count // PLAN.phases[1].loop.batch_size)):
        total = total + WIDE_STEP
    return total


def owed(bench):
    return bench.local.residual("run-1")[0].owed.get(WIDE.name)


def test_an_accepted_update_leaves_what_its_codec_lost(bench):
    offer(bench)
    bench.worker.step()
    came = arrived(bench)
    assert (came[WIDE.name] != 0).sum() == 30
    np.testing.assert_array_equal(came[WIDE.name] + owed(bench), trained(bench))
    assert np.abs(came["head.weight"]).max() > 0


def test_the_next_update_pays_it_back(bench):
    for number in (1, 2):
        offer(bench, number)
        bench.worker.step()
        if number == 1:
            first = arrived(bench)[WIDE.name]
    total = first + arrived(bench)[WIDE.name] + owed(bench)
    # two sums in float32 of numbers below 0.1: 4 roundings of 2^-28 each
    np.testing.assert_allclose(total, 2 * trained(bench), atol=4 * 2.0**-28)


@pytest.mark.parametrize("status", [ReceiptStatus.STALE, ReceiptStatus.REJECTED])
def test_an_update_that_does_not_count_leaves_what_was_owed_as_it_was(bench, status):
    offer(bench)
    bench.worker.step()
    before = owed(bench).copy()
    bench.cloud.receipt = Receipt(status, "too late")
    offer(bench, 2)
    bench.worker.step()
    np.testing.assert_array_equal(owed(bench), before)


def test_a_first_update_that_does_not_count_leaves_nothing(bench, monkeypatch):
    offer(bench)

    def refuse(*_):
        raise ConflictError("round closed")

    monkeypatch.setattr(bench.cloud, "submit", refuse)
    bench.worker.step()
    assert owed(bench) is None


@pytest.mark.parametrize("broken", ["submit", "submit_reply"])
def test_what_is_owed_changes_only_with_the_receipt_also_after_a_restart(bench, broken):
    offer(bench)
    bench.cloud.broken = {broken}
    with pytest.raises(TransportError):
        bench.worker.step()
    assert owed(bench) is None
    bench.cloud.broken = set()
    bench.cloud.receipt = Receipt(ReceiptStatus.DUPLICATE, "")
    bench.restart()
    bench.worker.step()
    np.testing.assert_array_equal(arrived(bench)[WIDE.name] + owed(bench), trained(bench))


def test_an_attempt_that_is_made_again_gives_the_same_bytes(tmp_path):
    digests = set()
    for name in ("one", "two"):
        bench = Bench(tmp_path / name)
        offer(bench, codec=UpdateCodec("int4"))
        bench.worker.step()
        digests.add(bench.cloud.submissions[0].update_digest)
    assert len(digests) == 1


def test_a_damaged_residual_is_reported_and_begins_again(bench):
    offer(bench)
    bench.worker.step()
    for path in (bench.state.federated / "residuals").iterdir():
        path.write_bytes(b"damaged")
    offer(bench, 2)
    bench.worker.step()
    assert bench.cloud.submissions[1].local_state_reset
    np.testing.assert_array_equal(arrived(bench)[WIDE.name] + owed(bench), trained(bench))


def test_missed_rounds_take_a_tenth_each_off_what_is_owed(bench):
    offer(bench)
    bench.worker.step()
    before = owed(bench).copy()
    offer(bench, 4)
    bench.worker.step()
    total = arrived(bench)[WIDE.name] + owed(bench)
    np.testing.assert_allclose(total, trained(bench) + 0.81 * before, atol=4 * 2.0**-28)


def test_what_is_owed_is_kept_for_the_last_runs_only(bench, monkeypatch):
    monkeypatch.setattr(bench.local, "discard", lambda: None)
    offer(bench)
    bench.worker.step()
    result = bench.local.pending()
    for number in range(2, 8):
        submission = replace(result.submission, run_id=f"run-{number}")
        bench.local.promote(replace(result, submission=submission))
    assert len(list((bench.state.federated / "residuals").iterdir())) == 4
    assert bench.local.residual("run-1")[0].owed == {}
    assert bench.local.residual("run-7")[0].owed.keys() == {WIDE.name}


def test_the_limit_of_bytes_is_on_what_the_codec_sends(bench):
    task = offer(bench)
    graphs = sum(map(len, make_plan(codec=TOPK).graphs.values()))
    bench.max_bytes = task.tensors_bytes + graphs + 300  # as float32 the update has more than 1200
    bench.restart()
    bench.worker.step()
    assert bench.cloud.declined == []
    assert len(bench.cloud.submissions) == 1


@pytest.mark.parametrize(
    "codec",
    [UpdateCodec(name) for name in ("fp16", "bf16", "int8", "int4", "sign")]
    + [UpdateCodec("randk", fraction=0.1), UpdateCodec("powersgd", rank=1)],
)
def test_every_codec_is_worked_with(bench, codec):
    offer(bench, codec=codec)
    bench.worker.step()
    came = arrived(bench, codec)
    assert np.abs(came[WIDE.name]).max() > 0
    assert came["norm.count"] > 0


def test_a_plan_with_a_codec_survives_its_document_and_an_unknown_one_is_refused():
    data = PLAN.to_bytes()
    assert Plan.from_bytes(data) == PLAN
    with pytest.raises(ProtocolError, match=r"unknown codec of updates 'zstd'.*topk"):
        Plan.from_bytes(data.replace(b'"name":"topk"', b'"name":"zstd"'))


def test_values_cannot_be_coded_with_loss():
    data = PLAN.to_bytes()
    with pytest.raises(ProtocolError, match="differences"):
        Plan.from_bytes(data.replace(b'"form":"delta"', b'"form":"value"'))
