"""The stream of work through real gRPC with mutual TLS: many questions on one call, every check, every break."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from service_harness import (
    begin_run,
    enrolled_device,
    global_tensors,
    running_service,
    service_settings,
    submission_messages,
    until,
)
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.blobs import Upload
from wearfleet_cloud.storage.device_records import revoke_device
from wearfleet_cloud.storage.run_records import find_run, list_rounds
from wearfleet_protos.chunks import CHUNK_BYTES, crc32c
from wearfleet_protos.tensors import digest_of, encode_tensors
from wearfleet_protos.v1 import artifact_pb2, federation_pb2, federation_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from service_harness import Device

pytestmark = pytest.mark.broker

SHAPES = {"a": (600, 1000), "b": (5,)}
SMALL = {"a": (3, 4), "b": (5,)}
MOST = 64 * 1024 * 1024


@dataclass
class Stream:
    """One call of a device, question by question, with ordinary protobuf objects."""

    call: Any

    @classmethod
    def of(cls, device: Device) -> Stream:
        stub: Any = federation_pb2_grpc.FederationServiceStub(device.channel)
        return cls(stub.Work())

    async def send(self, *messages: federation_pb2.WorkRequest) -> None:
        for message in messages:
            await self.call.write(message)

    async def poll(self, most: int = MOST) -> tuple[federation_pb2.FederatedTask, bytes]:
        """A task that must come, with what was sent along."""
        request = federation_pb2.PollTaskRequest(wait_seconds=60.0, max_streamed_bytes=most)
        await self.send(federation_pb2.WorkRequest(poll=request))
        response = await self.call.read()
        task, data = response.poll.task, bytearray()
        while len(data) < task.streamed_bytes:
            assert response.chunk.offset == len(data)
            assert response.chunk.crc32c == crc32c(response.chunk.data)
            data += response.chunk.data
            if len(data) < task.streamed_bytes:
                response = await self.call.read()
        assert task.run_id
        return task, bytes(data)

    async def submit(self, task: federation_pb2.FederatedTask, update: bytes) -> int:
        await self.send(*submission_messages(task, digest_of(update), update))
        response = await self.call.read()
        return int(response.receipt.status)

    async def refusal(self) -> grpc.StatusCode:
        """The status that ends the call."""
        while True:
            try:
                assert await self.call.read() != grpc.aio.EOF
            except grpc.aio.AioRpcError as error:
                return error.code()


@pytest.fixture
async def alone(tmp_path, monkeypatch):
    """A service with one device that has the first task of a run of three rounds."""
    monkeypatch.setattr("wearfleet_cloud.service.serve._GRACE_S", 1.0)
    settings = service_settings(tmp_path, federation={"max_update_bytes": 4 * CHUNK_BYTES})
    async with running_service(settings) as service:
        anna = await enrolled_device(service, "anna")
        run_id = await asyncio.to_thread(begin_run, settings, SHAPES, rounds=3, min_clients=1)
        stream = Stream.of(anna)
        task, _ = await stream.poll(0)
        yield SimpleNamespace(
            settings=settings, service=service, anna=anna, stream=stream, task=task, run_id=run_id
        )
        await anna.close()


def update_of(value: float = 1.0, shapes=SHAPES) -> bytes:
    return encode_tensors({name: np.full(shape, value, np.float32) for name, shape in shapes.items()})


async def test_all_rounds_of_a_run_go_over_one_stream_and_count_their_bytes(alone):
    update = update_of(2.0)
    for number in (1, 2, 3):
        task, tensors = await alone.stream.poll()
        assert (task.round, digest_of(tensors)) == (number, task.tensors_digest)
        assert await alone.stream.submit(task, update) == federation_pb2.RECEIPT_STATUS_ACCEPTED
        assert await alone.stream.submit(task, update) == federation_pb2.RECEIPT_STATUS_DUPLICATE
    await alone.stream.call.done_writing()
    assert await alone.stream.call.read() == grpc.aio.EOF
    assert await alone.stream.call.code() == grpc.StatusCode.OK
    state = open_state(alone.settings)

    def ended() -> bool:
        with state.database.read() as connection:
            return find_run(connection, alone.run_id).state == "done"

    await until(ended)
    assert all(np.all(array == 6.0) for array in global_tensors(state, alone.run_id).values())
    with state.database.read() as connection:
        rows = list_rounds(connection, alone.run_id)
    assert [(row.bytes_down, row.bytes_up) for row in rows] == [(len(update), len(update))] * 3
    state.database.close()


async def test_a_device_that_wants_fewer_bytes_gets_the_task_alone_and_downloads(alone):
    task, tensors = await alone.stream.poll(alone.task.tensors_bytes - 1)
    assert (task.attempt_id, tensors) == (alone.task.attempt_id, b"")
    assert digest_of(await alone.anna.download(task.tensors_digest)) == task.tensors_digest


@pytest.fixture
def chunk_came(monkeypatch) -> asyncio.Event:
    """Set when the service has taken a chunk of an update."""
    came, append = asyncio.Event(), Upload.append

    def noted(upload: Upload, offset: int, data: bytes | memoryview) -> None:
        append(upload, offset, data)
        came.set()

    monkeypatch.setattr(Upload, "append", noted)
    return came


async def forever(call: Callable[[], Awaitable[object]]) -> None:
    while True:
        await call()


async def accepted_now(alone, update: bytes) -> bool:
    """Hand in on a new stream."""
    return await Stream.of(alone.anna).submit(alone.task, update) == federation_pb2.RECEIPT_STATUS_ACCEPTED


def refused(device: Device, messages: list[federation_pb2.WorkRequest]) -> grpc.StatusCode:
    """How a call with these messages ends; grpc's asyncio client forgets the status when it is still sending."""
    credentials = grpc.ssl_channel_credentials(device.ca_pem, device.key_pem, device.chain_pem)
    with grpc.secure_channel(device.cloud_address, credentials) as channel:
        stub: Any = federation_pb2_grpc.FederationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Work(iter(messages)))
        return caught.value.code()


def enlarge(chunk: artifact_pb2.Chunk) -> None:
    chunk.data = bytes(CHUNK_BYTES + 1)
    chunk.crc32c = crc32c(chunk.data)


def change_checksum(chunk: artifact_pb2.Chunk) -> None:
    chunk.crc32c ^= 1


# of the three messages of an update
DAMAGES: dict[str, tuple[Callable[[list[federation_pb2.WorkRequest]], object], grpc.StatusCode]] = {
    "checksum": (lambda m: change_checksum(m[1].chunk), grpc.StatusCode.DATA_LOSS),
    "another offset": (lambda m: setattr(m[1].chunk, "offset", 7), grpc.StatusCode.ABORTED),
    "large chunk": (lambda m: enlarge(m[1].chunk), grpc.StatusCode.INVALID_ARGUMENT),
    "more than announced": (
        lambda m: setattr(m[0].submit, "streamed_bytes", CHUNK_BYTES + 1),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "no chunk": (lambda m: m[1].ClearField("chunk"), grpc.StatusCode.INVALID_ARGUMENT),
    "empty chunk": (lambda m: m[1].chunk.ClearField("data"), grpc.StatusCode.INVALID_ARGUMENT),
    "another digest": (
        lambda m: setattr(m[0].submit, "update_digest", digest_of(b"another")),
        grpc.StatusCode.DATA_LOSS,
    ),
    "no digest": (
        lambda m: setattr(m[0].submit, "update_digest", "../../etc/passwd"),
        grpc.StatusCode.DATA_LOSS,
    ),
    "larger than allowed": (
        lambda m: setattr(m[0].submit, "streamed_bytes", 4 * CHUNK_BYTES + 1),
        grpc.StatusCode.PERMISSION_DENIED,
    ),
    "a poll too": (lambda m: m[0].poll.SetInParent(), grpc.StatusCode.INVALID_ARGUMENT),
    "a chunk alone": (lambda m: m[0].ClearField("submit"), grpc.StatusCode.INVALID_ARGUMENT),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_is_no_update_as_announced_ends_the_stream_and_can_be_sent_again(alone, damage):
    change, status = DAMAGES[damage]
    update = update_of()
    messages = submission_messages(alone.task, digest_of(update), update)
    assert len(messages) == 3
    change(messages)
    assert await asyncio.to_thread(refused, alone.anna, messages) == status
    assert await accepted_now(alone, update)


async def test_junk_ends_the_stream_as_an_invalid_argument(alone):
    for junk in (b"\xff\xff\xff", b"", b"\x0a\x05ab", b"\x12\x02\x12\x05"):
        call = alone.anna.channel.stream_stream("/wearfleet.v1.FederationService/Work")()
        await call.write(junk)
        assert await Stream(call).refusal() == grpc.StatusCode.INVALID_ARGUMENT
    call = alone.anna.channel.stream_stream("/wearfleet.v1.FederationService/Work")()
    await call.write(bytes(5_000_000))
    assert await Stream(call).refusal() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("breaks", ["ends", "is cancelled"])
async def test_a_stream_that_breaks_in_mid_update_keeps_what_came(alone, chunk_came, breaks):
    update = update_of()
    digest = digest_of(update)
    first, *_ = submission_messages(alone.task, digest, update)
    await alone.stream.send(first)
    if breaks == "ends":
        await alone.stream.call.done_writing()
        assert await alone.stream.refusal() == grpc.StatusCode.UNAVAILABLE
    else:
        await chunk_came.wait()
        alone.stream.call.cancel()

    while (await alone.anna.stat(digest)).committed_offset != CHUNK_BYTES:  # the test has a time limit
        pass
    assert (await alone.anna.upload(update, offset=CHUNK_BYTES)).complete
    receipt = await alone.anna.submit(alone.task, digest)
    assert receipt.status == federation_pb2.RECEIPT_STATUS_ACCEPTED


async def test_an_update_that_broke_off_can_be_sent_from_its_beginning(alone):
    update = update_of()
    await alone.anna.upload(update, stop_at=CHUNK_BYTES)
    assert await accepted_now(alone, update)


async def test_the_same_update_on_two_streams_at_once_is_refused_on_the_second(alone, chunk_came):
    update = update_of()
    first, *rest = submission_messages(alone.task, digest_of(update), update)
    await alone.stream.send(first)
    second = Stream.of(alone.anna)
    await chunk_came.wait()
    await second.send(first)
    assert await second.refusal() == grpc.StatusCode.UNAVAILABLE
    await alone.stream.send(*rest)
    response = await alone.stream.call.read()
    assert response.receipt.status == federation_pb2.RECEIPT_STATUS_ACCEPTED


@pytest.mark.parametrize("update", [update_of(np.nan), update_of(shapes=SMALL), b"junk"])
async def test_an_update_that_cannot_be_used_is_rejected_and_the_stream_goes_on(alone, update):
    assert await alone.stream.submit(alone.task, update) == federation_pb2.RECEIPT_STATUS_REJECTED
    assert (await alone.stream.poll())[0].round == 2


async def test_an_update_that_nobody_waits_for_is_read_and_kept_nowhere(alone):
    eve = await enrolled_device(alone.service, "eve")
    stream = Stream.of(eve)
    await stream.send(*submission_messages(alone.task, digest_of(update_of()), update_of()))
    assert await stream.refusal() == grpc.StatusCode.PERMISSION_DENIED  # not invited
    folder = alone.settings.service.state_dir / "updates"
    assert [path for path in folder.rglob("*") if path.name.startswith(eve.device_id)] == []
    await eve.close()


async def test_a_device_that_is_revoked_is_refused_at_its_next_question(alone):
    state = open_state(alone.settings)
    with state.database.write() as connection:
        revoke_device(connection, alone.anna.device_id, 1)
    state.database.close()
    with pytest.raises(grpc.aio.AioRpcError):
        await forever(alone.anna.heartbeat)  # the service looks twice a second; the test has a time limit
    await alone.stream.send(federation_pb2.WorkRequest(poll=federation_pb2.PollTaskRequest()))
    assert await alone.stream.refusal() == grpc.StatusCode.PERMISSION_DENIED


async def test_a_service_that_stops_answers_what_is_under_way_and_ends_the_idle_streams(alone, chunk_came):
    idle, waiting = alone.stream, await enrolled_device(alone.service, "ben")
    poll = federation_pb2.PollTaskRequest(wait_seconds=60.0)
    asked = Stream.of(waiting)
    await asked.send(federation_pb2.WorkRequest(poll=poll))
    update = update_of()
    busy = Stream.of(alone.anna)
    first, *rest = submission_messages(alone.task, digest_of(update), update)
    await busy.send(first)
    await chunk_came.wait()
    stopping = asyncio.create_task(alone.service.stop())
    assert await idle.call.read() == grpc.aio.EOF
    assert await idle.call.code() == grpc.StatusCode.OK
    response = await asked.call.read()
    assert (response.HasField("poll"), response.poll.HasField("task")) == (True, False)
    assert await asked.call.read() == grpc.aio.EOF
    assert await busy.refusal() == grpc.StatusCode.UNAVAILABLE  # what came is kept for the next start
    await stopping
    await waiting.close()
    assert rest
