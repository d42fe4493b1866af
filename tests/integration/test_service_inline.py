"""Small tensors inside the task and the submission: the same checks as in streams, and nothing too large."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from service_harness import (
    begin_run,
    enrolled_device,
    global_tensors,
    running_service,
    service_settings,
    until,
)
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.run_records import find_run, list_rounds
from wearfleet_protos.chunks import CHUNK_BYTES
from wearfleet_protos.tensors import digest_of, encode_tensors
from wearfleet_protos.v1 import federation_pb2, federation_pb2_grpc

pytestmark = pytest.mark.broker

SHAPES = {"a": (3, 4), "b": (5,)}


@pytest.fixture
async def alone(tmp_path):
    """A service with one device that has the first task of a run of one round."""
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        anna = await enrolled_device(service, "anna")
        run_id = await asyncio.to_thread(begin_run, settings, SHAPES, rounds=1, min_clients=1)
        task = await poll(anna, CHUNK_BYTES)
        yield SimpleNamespace(settings=settings, anna=anna, task=task, run_id=run_id)
        await anna.close()


async def poll(device, max_inline_bytes: int) -> federation_pb2.FederatedTask:
    stub: Any = federation_pb2_grpc.FederationServiceStub(device.channel)
    request = federation_pb2.PollTaskRequest(wait_seconds=5.0, max_inline_bytes=max_inline_bytes)
    return (await stub.PollTask(request)).task


def update_of(value: float = 1.0, shapes=SHAPES) -> bytes:
    return encode_tensors({name: np.full(shape, value, np.float32) for name, shape in shapes.items()})


async def refusal(device, task, update: bytes, digest: str) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await device.submit(task, digest, update=update)
    return caught.value.code()


async def test_a_round_of_a_small_model_takes_two_calls(alone):
    assert digest_of(alone.task.tensors) == alone.task.tensors_digest
    update = update_of(2.0)
    receipts = [await alone.anna.submit(alone.task, digest_of(update), update=update) for _ in range(2)]
    assert [receipt.status for receipt in receipts] == [
        federation_pb2.RECEIPT_STATUS_ACCEPTED,
        federation_pb2.RECEIPT_STATUS_DUPLICATE,
    ]
    state = open_state(alone.settings)

    def ended() -> bool:
        with state.database.read() as connection:
            return find_run(connection, alone.run_id).state == "done"

    await until(ended)
    assert all(np.all(array == 2.0) for array in global_tensors(state, alone.run_id).values())
    with state.database.read() as connection:
        (row,) = list_rounds(connection, alone.run_id)
    assert (row.bytes_down, row.bytes_up) == (len(alone.task.tensors), len(update))
    state.database.close()


async def test_a_device_that_wants_less_inline_downloads(alone):
    task = await poll(alone.anna, len(alone.task.tensors) - 1)
    assert (task.attempt_id, task.tensors) == (alone.task.attempt_id, b"")
    assert digest_of(await alone.anna.download(task.tensors_digest)) == task.tensors_digest


async def test_an_inline_update_with_another_digest_is_refused_and_can_be_sent_again(alone):
    update = update_of()
    status = await refusal(alone.anna, alone.task, update, digest_of(b"another"))
    assert status == grpc.StatusCode.DATA_LOSS
    receipt = await alone.anna.submit(alone.task, digest_of(update), update=update)
    assert receipt.status == federation_pb2.RECEIPT_STATUS_ACCEPTED


async def test_an_inline_update_of_more_than_one_chunk_is_refused(alone):
    update = update_of(shapes={"a": (CHUNK_BYTES // 4,)})
    assert (
        await refusal(alone.anna, alone.task, update, digest_of(update)) == grpc.StatusCode.INVALID_ARGUMENT
    )


@pytest.mark.parametrize("update", [update_of(np.nan), update_of(shapes={"a": (3, 4)}), b"junk"])
async def test_an_inline_update_that_cannot_be_used_is_rejected(alone, update):
    receipt = await alone.anna.submit(alone.task, digest_of(update), update=update)
    assert receipt.status == federation_pb2.RECEIPT_STATUS_REJECTED


async def test_an_inline_update_for_another_attempt_is_denied(alone):
    update = update_of()
    task = federation_pb2.FederatedTask()
    task.CopyFrom(alone.task)
    task.attempt_id = "0" * 32
    assert await refusal(alone.anna, task, update, digest_of(update)) == grpc.StatusCode.PERMISSION_DENIED
