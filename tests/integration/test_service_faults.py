"""A full disk and a slow link: the round ends right, or is skipped with the old model kept."""

from __future__ import annotations

import asyncio
import time

import grpc
import numpy as np
import pytest
from bad_places import SmallDisk, slow_link
from service_harness import (
    begin_run,
    enrolled_device,
    global_tensors,
    running_service,
    service_settings,
    until,
)
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.run_records import list_rounds, list_submissions
from wearfleet_protos.tensors import digest_of, encode_tensors
from wearfleet_protos.v1 import federation_pb2

pytestmark = pytest.mark.broker

SHAPES = {"a": (500, 500), "b": (5,)}
ACCEPTED = federation_pb2.RECEIPT_STATUS_ACCEPTED


def update_of(value: float) -> bytes:
    return encode_tensors({name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()})


def rounds_of(settings, run_id: str) -> list[tuple[str, int]]:
    """State and accepted submissions of every round."""
    state = open_state(settings)
    with state.database.read() as connection:
        rounds = [
            (r.state, len(list_submissions(connection, run_id, r.round)))
            for r in list_rounds(connection, run_id)
        ]
    state.database.close()
    return rounds


async def test_a_full_disk_skips_the_round_and_the_next_one_goes_on_when_there_is_room(tmp_path):
    settings = service_settings(tmp_path / "state")
    disk = SmallDisk(tmp_path / "state" / "updates", 600)  # an update has 1000 kB
    try:
        async with running_service(settings) as service:
            anna, ben = [await enrolled_device(service, name) for name in ("anna", "ben")]
            run_id = await asyncio.to_thread(
                begin_run, settings, SHAPES, rounds=2, min_clients=2, quorum=2, deadline_s=15.0
            )
            tasks = await asyncio.gather(anna.task(), ben.task())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anna.upload(update_of(1.0))
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "No space left" in str(caught.value.details())
            await until(lambda: rounds_of(settings, run_id)[0][0] == "skipped")
            assert rounds_of(settings, run_id)[0] == ("skipped", 0)
            disk.enlarge(8000)
            again = await asyncio.gather(anna.task(), ben.task())
            assert [task.tensors_digest for task in again] == [task.tensors_digest for task in tasks]
            receipts = await asyncio.gather(anna.answer(again[0], 1.0), ben.answer(again[1], 3.0))
            assert {receipt.status for receipt in receipts} == {ACCEPTED}
            await until(lambda: rounds_of(settings, run_id)[-1][0] == "published")
            assert rounds_of(settings, run_id) == [("skipped", 0), ("published", 2)]
            state = open_state(settings)
            assert np.all(global_tensors(state, run_id)["a"] == 2.0)
            state.database.close()
            for device in (anna, ben):
                await device.close()
    finally:
        disk.close()


async def test_an_upload_that_a_full_disk_cut_goes_on_where_it_stopped(tmp_path):
    settings = service_settings(tmp_path / "state")
    disk = SmallDisk(tmp_path / "state" / "updates", 600)
    update = update_of(2.0)
    try:
        async with running_service(settings) as service:
            anna = await enrolled_device(service)
            run_id = await asyncio.to_thread(begin_run, settings, SHAPES, rounds=1, min_clients=1)
            task = await anna.task()
            with pytest.raises(grpc.aio.AioRpcError):
                await anna.upload(update)
            disk.enlarge(8000)
            committed = (await anna.stat(digest_of(update))).committed_offset
            assert 0 < committed < len(update)
            await anna.upload(update, offset=committed)
            assert (await anna.submit(task, digest_of(update))).status == ACCEPTED
            await until(lambda: rounds_of(settings, run_id) == [("published", 1)])
            state = open_state(settings)
            assert np.all(global_tensors(state, run_id)["a"] == 2.0)
            state.database.close()
            await anna.close()
    finally:
        disk.close()


async def test_a_device_on_a_slow_link_is_waited_for_and_holds_up_nobody_else(tmp_path):
    settings = service_settings(tmp_path)
    rate = 500_000.0
    async with running_service(settings) as service:
        anna, ben = [await enrolled_device(service, name) for name in ("anna", "ben")]
        async with slow_link(anna.cloud_address, rate) as address:
            anna.cloud_address = address
            run_id = await asyncio.to_thread(
                begin_run, settings, SHAPES, rounds=1, min_clients=2, deadline_s=60.0
            )
            tasks = await asyncio.gather(anna.task(), ben.task())
            began, ended = time.monotonic(), dict[str, float]()

            async def work(device, task) -> None:
                receipt = await device.answer(task, 1.0)
                assert receipt.status == ACCEPTED
                ended[device.device_id] = time.monotonic() - began

            await asyncio.gather(work(anna, tasks[0]), work(ben, tasks[1]))
            await until(lambda: rounds_of(settings, run_id) == [("published", 2)])
            # a million bytes down and as many up
            assert ended[anna.device_id] > 2 * len(update_of(1.0)) / rate
            assert ended[ben.device_id] < ended[anna.device_id]
            for device in (anna, ben):
                await device.close()
