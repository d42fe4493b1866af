"""FedBuff on a real service: a buffer is a round, who is late goes on into the next one, and all counts once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from service_harness import (
    begin_plan,
    echo_plan,
    enrolled_device,
    global_tensors,
    running_service,
    service_settings,
    until,
)
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.round import Round, RoundPolicy
from wearfleet_cloud.service.run_context import RunSettings
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.run_records import list_rounds, list_submissions
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import digest_of, encode_tensors
from wearfleet_protos.v1 import federation_pb2

pytestmark = pytest.mark.broker

SHAPES = {"a": (3, 4), "b": (5,)}
PLAN = replace(echo_plan(SHAPES), strategy="fedbuff", plan_id="fedbuff-echo")
ACCEPTED = federation_pb2.RECEIPT_STATUS_ACCEPTED


def begin(settings, rounds: int = 4, cohort: int = 0, **options: object) -> str:
    run = RunSettings(
        rounds,
        CohortPolicy(cohort, 3),
        RoundPolicy(deadline_s=60.0),
        {"buffer_size": 2, "concurrency": 3, **options},
        personalise=False,
    )
    return begin_plan(settings, PLAN, run)


@pytest.fixture
async def trio(tmp_path):
    """A service with three devices at work on the first version; two of them fill its buffer."""
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, name) for name in ("anna", "ben", "cleo")]
        yield SimpleNamespace(
            settings=settings, service=service, anna=devices[0], ben=devices[1], cleo=devices[2]
        )
        for device in devices:
            await device.close()


async def first_buffer(trio) -> federation_pb2.FederatedTask:
    """All get a task, two hand in an update of 1; the task of the third, which is still at work."""
    tasks = await asyncio.gather(*(d.task() for d in (trio.anna, trio.ben, trio.cleo)))
    assert {task.round for task in tasks} == {1}
    for device, task in zip((trio.anna, trio.ben), tasks, strict=False):
        assert (await device.answer(task, 1.0)).status == ACCEPTED
    return tasks[2]


def rounds_of(settings, run_id) -> list[Round]:
    state = open_state(settings)
    with state.database.read() as connection:
        rounds = [Round.from_dict(row.snapshot) for row in list_rounds(connection, run_id)]
    state.database.close()
    return rounds


async def test_a_late_update_counts_with_less_weight_in_the_next_buffer_and_once(trio):
    run_id = await asyncio.to_thread(begin, trio.settings)
    late = await first_buffer(trio)
    next_task = await trio.anna.task()
    assert (next_task.round, next_task.tensors_digest != late.tensors_digest) == (2, True)
    assert (await trio.cleo.answer(late, 2.0)).status == ACCEPTED
    update = encode_tensors({n: np.full(s, 2.0, np.float32) for n, s in SHAPES.items()})
    again = await trio.cleo.submit(late, digest_of(update))
    assert again.status == federation_pb2.RECEIPT_STATUS_DUPLICATE
    assert (await trio.anna.answer(next_task, 1.0)).status == ACCEPTED
    await until(lambda: len(rounds_of(trio.settings, run_id)) == 3)
    assert (await trio.cleo.submit(late, digest_of(update))).status == federation_pb2.RECEIPT_STATUS_DUPLICATE
    state = open_state(trio.settings)
    # 1, then the mean of 1 and of 2 weighed by (1 + 1)^-1/2; two roundings to float32
    expected = 1.0 + (1.0 + 2.0 * 2**-0.5) / 2
    for array in global_tensors(state, run_id).values():
        np.testing.assert_allclose(array, expected, rtol=2**-22)
    with state.database.read() as connection:
        counted = [(s.device_id, s.round) for s in list_submissions(connection, run_id)]
    state.database.close()
    names = [d.device_id for d in (trio.anna, trio.ben, trio.cleo, trio.anna)]
    assert counted == list(zip(names, (1, 1, 2, 2), strict=True))
    assert [r.staleness for r in rounds_of(trio.settings, run_id)[1].receipts] == [1, 0]


async def test_who_is_too_late_is_told_so_and_a_freed_slot_is_given_on(trio):
    run_id = await asyncio.to_thread(begin, trio.settings, max_staleness=0)
    late = await first_buffer(trio)
    assert not await trio.cleo.report(late)
    assert (await trio.cleo.answer_late(late)).status == federation_pb2.RECEIPT_STATUS_STALE
    tasks = [await device.task() for device in (trio.anna, trio.ben, trio.cleo)]
    assert {task.round for task in tasks} == {2}
    dan = await enrolled_device(trio.service, "dan")
    assert await dan.poll(0.1) is None, "all three slots are taken"
    assert (await trio.anna.answer(tasks[0], 1.0)).status == ACCEPTED
    assert (await dan.task()).round == 2
    assert (await trio.cleo.answer(tasks[2], 1.0)).status == ACCEPTED
    await until(lambda: len(rounds_of(trio.settings, run_id)) == 3)
    await dan.close()


async def test_a_device_at_work_goes_on_after_a_restart_and_with_its_half_uploaded_update(tmp_path):
    settings = service_settings(tmp_path)
    update = encode_tensors({n: np.full(s, 2.0, np.float32) for n, s in SHAPES.items()})
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, name) for name in ("anna", "ben", "cleo")]
        run_id = await asyncio.to_thread(begin, settings)
        tasks = await asyncio.gather(*(device.task() for device in devices))
        await devices[2].upload(update, stop_at=40)
        await asyncio.gather(*(d.answer(t, 1.0) for d, t in zip(devices[:2], tasks, strict=False)))
        await until(lambda: len(rounds_of(settings, run_id)) == 2)
        assert (await devices[2].stat(digest_of(update))).committed_offset == 40
    async with running_service(settings):
        committed = (await devices[2].stat(digest_of(update))).committed_offset
        assert committed == 40
        await devices[2].upload(update, offset=committed)
        assert (await devices[2].submit(tasks[2], digest_of(update))).status == ACCEPTED
        second = rounds_of(settings, run_id)[1]
        assert [(r.client, r.staleness, r.base) for r in second.receipts] == [
            (devices[2].device_id, 1, tasks[2].tensors_digest)
        ]
    for device in devices:
        await device.close()


def test_a_run_with_a_cohort_beside_its_buffer_is_refused_at_start(tmp_path):
    with pytest.raises(ConfigError, match="buffer_size"):
        begin(service_settings(tmp_path), cohort=3)
