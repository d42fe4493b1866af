"""The stream of work against a real server with mutual TLS: many questions on one call, and every way it can break."""

import pytest
from edge.simulators import Authority, GrpcService, Signer, SimulatedCloud, enrolled_state, serve, wait_until
from wearfleet_edge.transport import rpc
from wearfleet_edge.transport.cloud import ReceiptStatus, Submission, Task
from wearfleet_edge.transport.rpc import RpcCloud
from wearfleet_protos.chunks import CHUNK_BYTES
from wearfleet_protos.errors import DeniedError, IntegrityError, ProtocolError, TransportError
from wearfleet_protos.tensors import digest_of

TENSORS = bytes(range(256)) * (2 * CHUNK_BYTES // 256) + b"the end"
UPDATE = TENSORS[::-1]


@pytest.fixture
def service():
    with serve(GrpcService(SimulatedCloud(), Authority(), Signer())) as running:
        yield running


@pytest.fixture
def cloud(service, tmp_path):
    client = RpcCloud.of_device(*enrolled_state(tmp_path, service.authority, service.address))
    yield client
    client.close()


def offer(service, tensors=TENSORS, number=1) -> Task:
    digest = service.cloud.add(tensors)
    task = Task("run", number, f"attempt-{number}", False, digest_of(b"x"), 1, digest, len(tensors), 30.0)
    service.cloud.tasks.append(task)
    return task


def result_of(task: Task, update=UPDATE) -> Submission:
    digest = digest_of(update) if update else ""
    return Submission(
        task.run_id, task.round_number, task.attempt_id, digest, task.tensors_digest, 7, 3, {}, 0.5, False
    )


def test_several_tasks_with_their_tensors_and_updates_take_one_stream(service, cloud):
    for number in (1, 2, 3):
        task = offer(service, TENSORS + bytes([number]), number)
        got = cloud.poll_task(0.0, "").task
        assert (got.attempt_id, bytes(got.tensors)) == (task.attempt_id, TENSORS + bytes([number]))
        update = UPDATE + bytes([number])
        assert cloud.submit(result_of(task, update), update).status is ReceiptStatus.ACCEPTED
        assert service.cloud.blobs[digest_of(update)] == update
    assert cloud.poll_task(0.0, "").task is None
    assert service.streams == 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [("crc", TransportError), ("offset", ProtocolError), ("cut", TransportError), ("size", IntegrityError)],
)
def test_tensors_that_break_on_the_way_are_left_to_a_resumable_download(
    service, cloud, monkeypatch, fault, error
):
    monkeypatch.setattr(rpc, "STREAMED_BYTES", len(TENSORS) - (fault == "size"))
    cloud._streamed_bytes = rpc.STREAMED_BYTES
    offer(service)
    service.fault = fault
    with pytest.raises(error):
        cloud.poll_task(0.0, "")
    second = cloud.poll_task(0.0, "").task  # on a new stream
    assert (second.tensors, second.tensors_bytes) == (b"", len(TENSORS))
    assert service.polls[1].max_streamed_bytes == 0
    if fault != "size":
        assert cloud.poll_task(0.0, "").task.tensors == TENSORS
    assert service.streams == 2


def test_an_update_that_broke_off_goes_on_as_an_upload_where_it_stopped(service, cloud):
    task = offer(service)
    service.fault = "cut"
    with pytest.raises(TransportError):
        cloud.submit(result_of(task), UPDATE)
    assert len(service.partial[digest_of(UPDATE)]) == CHUNK_BYTES
    assert cloud.submit(result_of(task), UPDATE).status is ReceiptStatus.ACCEPTED
    assert service.uploads == [0, CHUNK_BYTES]  # refused at 0, taken where it stood
    assert service.cloud.blobs[digest_of(UPDATE)] == UPDATE
    other = offer(service, number=2)
    cloud.submit(result_of(other, b"again"), b"again")
    assert service.uploads == [0, CHUNK_BYTES]  # the next one travels along again


def test_a_submission_whose_receipt_was_lost_is_repeated_without_its_bytes(service, cloud):
    task = offer(service)
    service.cloud.broken = {"submit_reply"}
    with pytest.raises(TransportError):
        cloud.submit(result_of(task), UPDATE)
    service.cloud.broken = set()
    cloud.submit(result_of(task), UPDATE)
    assert [submission.streamed_bytes for submission in service.cloud.submissions] == [len(UPDATE), 0]
    assert service.uploads == []


def test_an_update_that_is_too_large_for_the_stream_is_uploaded(service, cloud):
    cloud._streamed_bytes = len(UPDATE) - 1
    cloud.submit(result_of(offer(service)), UPDATE)
    assert service.uploads == [0]
    assert service.cloud.blobs[digest_of(UPDATE)] == UPDATE


def test_what_the_service_refuses_is_an_error_of_ours_and_the_next_question_opens_a_new_stream(
    service, cloud
):
    task = offer(service)
    service.fault = "refuse"
    with pytest.raises(DeniedError, match="revoked"):
        cloud.submit(result_of(task), UPDATE)
    assert cloud.poll_task(0.0, "").task.attempt_id == task.attempt_id
    assert service.streams == 2


def test_a_stream_that_was_lost_between_two_questions_is_opened_again_without_an_error(service, cloud):
    assert cloud.poll_task(0.0, "").task is None
    service.end_stream()
    connection = cloud._work._connection
    assert connection is not None
    assert wait_until(lambda: not connection.call.is_active())
    assert cloud.poll_task(0.0, "").task is None
    assert service.streams == 2


def test_a_service_that_does_not_answer_in_time_is_a_retryable_error(service, cloud):
    service.fault = "silent"
    with pytest.raises(TransportError, match="did not answer") as caught:
        cloud._work.poll(rpc.federation_pb2.PollTaskRequest(), 0.1)
    assert caught.value.retryable


def test_a_client_that_is_closed_in_mid_question_ends_it(service, cloud):
    service.fault, service.when_silent = "silent", cloud.close
    with pytest.raises(TransportError, match="closed"):
        cloud.poll_task(0.0, "")
