"""Federated rounds through real gRPC with mutual TLS."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

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
from wearfleet_cloud.federated.round import Round
from wearfleet_cloud.service.run_context import RunSettings
from wearfleet_cloud.service.run_setup import start_run
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.device_records import quarantine_device, release_device, revoke_device
from wearfleet_cloud.storage.run_records import find_run, list_rounds, list_submissions, stop_run
from wearfleet_protos.errors import IntegrityError
from wearfleet_protos.plan import PLAN_MEDIA_TYPE, Plan
from wearfleet_protos.signing import verify
from wearfleet_protos.tensors import digest_of, encode_tensors
from wearfleet_protos.v1 import federation_pb2

pytestmark = pytest.mark.broker

SHAPES = {"a": (3, 4), "b": (5,)}


async def test_a_run_averages_what_its_devices_send_and_ends_with_personalisation(tmp_path):
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, name) for name in ("anna", "ben")]
        run_id = await asyncio.to_thread(
            begin_run, settings, SHAPES, rounds=2, min_clients=2, personalise=True
        )
        kinds = []
        for _ in range(3):
            tasks = await asyncio.gather(*(device.task() for device in devices))
            kinds.append(tasks[0].kind)
            receipts = await asyncio.gather(
                *(d.answer(t, shift) for d, t, shift in zip(devices, tasks, (1.0, 3.0), strict=True))
            )
            assert {r.status for r in receipts} == {federation_pb2.RECEIPT_STATUS_ACCEPTED}
        state = open_state(settings)

        def ended() -> bool:
            with state.database.read() as connection:
                return find_run(connection, run_id).state == "done"

        await until(ended)
        assert kinds == [federation_pb2.TASK_KIND_TRAIN] * 2 + [federation_pb2.TASK_KIND_PERSONALISE]
        assert all(np.all(array == 4.0) for array in global_tensors(state, run_id).values())
        with state.database.read() as connection:
            assert [row.state for row in list_rounds(connection, run_id)] == ["published"] * 3
            assert len(list_submissions(connection, run_id)) == 6
        state.database.close()
        for device in devices:
            await device.close()


@pytest.fixture
async def pair(tmp_path):
    """A service with two devices that have the first task of a run of two rounds."""
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, name) for name in ("anna", "ben")]
        run_id = await asyncio.to_thread(begin_run, settings, SHAPES, rounds=2, min_clients=2)
        tasks = await asyncio.gather(*(device.task() for device in devices))
        yield SimpleNamespace(
            settings=settings, service=service, run_id=run_id, anna=devices[0], ben=devices[1], tasks=tasks
        )
        for device in devices:
            await device.close()


def update_of(shapes=SHAPES, value=1.0, dtype=np.float32) -> bytes:
    return encode_tensors({name: np.full(shape, value, dtype) for name, shape in shapes.items()})


async def rejection(device, task, update: bytes) -> str:
    await device.upload(update)
    receipt = await device.submit(task, digest_of(update))
    assert receipt.status == federation_pb2.RECEIPT_STATUS_REJECTED
    return receipt.reason


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (update_of({"a": (3, 4), "b": (6,)}), "tensor b"),
        (update_of({"a": (3, 4)}), "missing"),
        (update_of(value=np.nan), "NaN"),
        (update_of(value=np.inf), "NaN or infinity"),
        (update_of(dtype=np.float64), "float64"),
        (b"this is no safetensors file", "safetensors"),
    ],
)
async def test_an_unusable_update_is_rejected_and_the_round_goes_on_without_it(pair, update, reason):
    assert reason in await rejection(pair.anna, pair.tasks[0], update)
    receipt = await pair.ben.answer(pair.tasks[1], 2.0)
    assert receipt.status == federation_pb2.RECEIPT_STATUS_ACCEPTED
    assert (await pair.ben.task()).round == 2
    state = open_state(pair.settings)
    assert np.all(global_tensors(state, pair.run_id)["b"] == 2.0)
    state.database.close()


async def test_an_update_after_a_refused_one_is_checked_too(pair):
    await rejection(pair.anna, pair.tasks[0], update_of(value=np.nan))
    assert "missing" in await rejection(pair.anna, pair.tasks[0], update_of({"a": (3, 4)}))
    await pair.anna.decline(pair.tasks[0], "no wish to")
    assert "NaN" in await rejection(pair.anna, pair.tasks[0], update_of(value=np.inf))
    receipt = await pair.anna.answer(pair.tasks[0], 1.0)
    assert receipt.status == federation_pb2.RECEIPT_STATUS_ACCEPTED


async def test_an_update_from_another_base_is_rejected(pair):
    update = update_of()
    await pair.anna.upload(update)
    receipt = await pair.anna.submit(pair.tasks[0], digest_of(update), base_digest=digest_of(b"old"))
    assert receipt.status == federation_pb2.RECEIPT_STATUS_REJECTED
    assert "started from" in receipt.reason


async def test_an_update_sent_twice_counts_once_and_another_one_is_a_conflict(pair):
    update, other = update_of(value=1.0), update_of(value=9.0)
    for data in (update, other):
        await pair.anna.upload(data)
    statuses = [(await pair.anna.submit(pair.tasks[0], digest_of(update))).status for _ in range(3)]
    assert statuses == [
        federation_pb2.RECEIPT_STATUS_ACCEPTED,
        federation_pb2.RECEIPT_STATUS_DUPLICATE,
        federation_pb2.RECEIPT_STATUS_DUPLICATE,
    ]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair.anna.submit(pair.tasks[0], digest_of(other))
    assert caught.value.code() == grpc.StatusCode.ABORTED
    await pair.ben.answer(pair.tasks[1], 3.0)
    assert (await pair.anna.task()).round == 2
    assert (
        await pair.anna.submit(pair.tasks[0], digest_of(update))
    ).status == federation_pb2.RECEIPT_STATUS_DUPLICATE
    assert (
        await pair.ben.submit(pair.tasks[1], digest_of(other))
    ).status == federation_pb2.RECEIPT_STATUS_STALE
    state = open_state(pair.settings)
    assert np.all(global_tensors(state, pair.run_id)["a"] == 2.0)
    state.database.close()


async def test_a_device_that_was_not_invited_or_uses_another_attempt_is_denied(pair):
    eve = await enrolled_device(pair.service, "eve")
    update = update_of()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await eve.upload(update)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    for device, task in ((eve, pair.tasks[0]), (pair.anna, pair.tasks[1])):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await device.submit(task, digest_of(update))
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert await eve.poll(0.1) is None
    await eve.close()


async def test_an_update_that_was_not_uploaded_is_not_found_and_can_still_be_sent(pair):
    update = update_of()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair.anna.submit(pair.tasks[0], digest_of(update))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    await pair.anna.upload(update)
    assert (
        await pair.anna.submit(pair.tasks[0], digest_of(update))
    ).status == federation_pb2.RECEIPT_STATUS_ACCEPTED


async def test_metrics_that_are_not_finite_or_too_many_are_invalid(pair):
    update = update_of()
    await pair.anna.upload(update)
    for metrics in ({"m": float("nan")}, {str(n): 1.0 for n in range(300)}, {"x" * 200: 1.0}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pair.anna.submit(pair.tasks[0], digest_of(update), metrics=metrics)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_an_upload_goes_on_where_it_broke_off_and_stays_private(pair):
    update = update_of({"a": (1200, 1000), "b": (5,)})
    digest = digest_of(update)
    await pair.anna.upload(update, stop_at=1024 * 1024)
    assert (await pair.anna.stat(digest)).committed_offset == 1024 * 1024
    assert (await pair.ben.stat(digest)).committed_offset == 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair.anna.upload(update, offset=0, stop_at=0)
    assert caught.value.code() == grpc.StatusCode.ABORTED
    assert (await pair.anna.upload(update, offset=1024 * 1024)).complete
    assert (await pair.anna.stat(digest)).complete
    assert not (await pair.ben.stat(digest)).complete
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair.ben.download(digest)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_an_upload_that_does_not_match_its_digest_is_thrown_away(pair):
    update = update_of()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair.anna.upload(update, digest=digest_of(b"something else"))
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    assert (await pair.anna.stat(digest_of(b"something else"))).committed_offset == 0


async def test_a_round_without_one_device_ends_when_it_declines(pair):
    await pair.ben.answer(pair.tasks[1], 2.0)
    await pair.anna.decline(pair.tasks[0], "battery")
    assert (await pair.ben.task()).round == 2


async def test_the_document_of_the_plan_is_signed_and_a_changed_one_is_refused_at_start(pair):
    document = await pair.anna.download(pair.tasks[0].plan_digest)
    plan = Plan.from_bytes(verify(document, pair.anna.keys, PLAN_MEDIA_TYPE))
    assert {spec.name for spec in plan.upload_specs()} == set(SHAPES)
    with pytest.raises(IntegrityError, match="changed"):
        verify(document.replace(b"echo-", b"acho-"), pair.anna.keys, PLAN_MEDIA_TYPE)
    state = open_state(pair.settings)
    with pytest.raises(IntegrityError, match="graph"):
        start_run(
            state.database,
            state.blobs,
            state.keys,
            plan=plan,
            graphs={plan.phases[0].graph: b"another graph"},
            tensors={name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()},
            settings=RunSettings(1),
            now_ns=1,
        )
    state.database.close()


async def test_a_run_whose_plan_was_changed_on_disk_is_stopped_and_says_why(tmp_path):
    settings = service_settings(tmp_path)
    run_id = await asyncio.to_thread(begin_run, settings, SHAPES, rounds=1, min_clients=1)
    state = open_state(settings)
    with state.database.read() as connection:
        digest = find_run(connection, run_id).plan_digest.removeprefix("sha256:")
    file = tmp_path / "artifacts" / "complete" / digest[:2] / digest[2:]
    file.write_bytes(file.read_bytes().replace(b"echo-", b"acho-"))
    async with running_service(settings):
        with state.database.read() as connection:
            run = find_run(connection, run_id)
    assert run.state == "stopped"
    assert "changed on disk" in run.reason
    state.database.close()


async def test_a_deadline_without_quorum_skips_the_round_and_keeps_the_tensors(tmp_path):
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        anna = await enrolled_device(service)
        run_id = await asyncio.to_thread(
            begin_run, settings, SHAPES, rounds=2, min_clients=1, quorum=2, deadline_s=5.0
        )
        first = await anna.task()
        assert (await anna.answer(first, 5.0)).status == federation_pb2.RECEIPT_STATUS_ACCEPTED
        second = await anna.task()
        assert second.round == 2
        assert second.tensors_digest == first.tensors_digest
        assert await anna.poll(0.1) is not None
        state = open_state(settings)

        def states() -> list[str]:
            with state.database.read() as connection:
                return [row.state for row in list_rounds(connection, run_id)]

        await until(lambda: states() == ["skipped", "skipped"])
        assert (await anna.answer_late(second)).status == federation_pb2.RECEIPT_STATUS_STALE
        state.database.close()
        await anna.close()


async def test_a_stopped_run_wants_no_more_work(pair):
    state = open_state(pair.settings)
    with state.database.write() as connection:
        assert stop_run(connection, pair.run_id, 1, "enough")

    await until(lambda: pair.service.live.round is not None and pair.service.live.round.state == "aborted")
    assert (await pair.anna.answer_late(pair.tasks[0])).status == federation_pb2.RECEIPT_STATUS_STALE
    assert await pair.anna.poll(0.1) is None
    state.database.close()


async def test_a_revoked_device_leaves_the_round_and_is_shut_out(pair):
    state = open_state(pair.settings)
    with state.database.write() as connection:
        revoke_device(connection, pair.anna.device_id, 1)
    await pair.ben.answer(pair.tasks[1], 2.0)

    def published() -> bool:
        with state.database.read() as connection:
            return list_rounds(connection, pair.run_id)[0].state == "published"

    await until(published)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pair.anna.poll(0.1)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    state.database.close()


async def test_a_device_in_quarantine_is_asked_by_no_round_until_it_is_released(tmp_path):
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        anna, ben = devices = [await enrolled_device(service, name) for name in ("anna", "ben")]
        run_id = await asyncio.to_thread(begin_run, settings, SHAPES, rounds=60, min_clients=1)
        state = open_state(settings)
        tasks = await asyncio.gather(*(device.task() for device in devices))
        with state.database.write() as connection:
            quarantine_device(connection, anna.device_id, 7, "far from all others")
        await ben.answer(tasks[1], 2.0)  # ends round 1: nobody waits for her any more
        second = await ben.task()
        assert (second.round, await anna.poll(0.3)) == (2, None)
        assert (await anna.answer_late(tasks[0])).status == federation_pb2.RECEIPT_STATUS_STALE
        with state.database.write() as connection:
            release_device(connection, anna.device_id)
        waiting, task = asyncio.create_task(anna.task()), second
        while not waiting.done():  # the service notices within a second
            await ben.answer(task, 2.0)
            task = await ben.task()
            await asyncio.wait({waiting}, timeout=0.2)
        hers = await waiting
        assert hers.round == task.round
        assert (await anna.answer(hers, 2.0)).status == federation_pb2.RECEIPT_STATUS_ACCEPTED
        with state.database.read() as connection:
            rows = list_rounds(connection, run_id)
        counted = [{r["client"] for r in row.snapshot["receipts"]} for row in rows[: hers.round]]
        assert counted == [{ben.device_id}] * (hers.round - 1) + [{anna.device_id}]
        state.database.close()
        for device in devices:
            await device.close()


async def test_a_service_stopped_in_mid_round_goes_on_with_it(tmp_path):
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        anna, ben = [await enrolled_device(service, name) for name in ("anna", "ben")]
        run_id = await asyncio.to_thread(begin_run, settings, SHAPES, rounds=1, min_clients=2)
        tasks = await asyncio.gather(anna.task(), ben.task())
        await anna.answer(tasks[0], 1.0)
        update = update_of(value=3.0)
        await ben.upload(update, stop_at=40)
        for device in (anna, ben):
            await device.close()
    async with running_service(settings):
        task = await ben.task()
        assert task.attempt_id == tasks[1].attempt_id
        assert await anna.poll(0.1) is None
        committed = (await ben.stat(digest_of(update))).committed_offset
        assert committed == 40
        await ben.upload(update, offset=committed)
        await ben.submit(task, digest_of(update))
        state = open_state(settings)

        def ended() -> bool:
            with state.database.read() as connection:
                return find_run(connection, run_id).state == "done"

        await until(ended)
        assert np.all(global_tensors(state, run_id)["a"] == 2.0)
        with state.database.read() as connection:
            assert len(list_submissions(connection, run_id)) == 2
        state.database.close()
        for device in (anna, ben):
            await device.close()


async def test_a_strategy_that_fails_in_an_unforeseen_way_ends_the_round_and_not_the_service(
    pair, monkeypatch
):
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("wearfleet_cloud.service.folding.Folding.fold", fail)
    await pair.anna.answer(pair.tasks[0], 1.0)
    await pair.ben.answer(pair.tasks[1], 1.0)
    await pair.anna.task()
    state = open_state(pair.settings)
    with state.database.read() as connection:
        first, *_ = list_rounds(connection, pair.run_id)
    assert first.state == "skipped"
    assert "internal error" in first.snapshot["reason"]
    state.database.close()


async def test_a_silent_device_loses_its_place_to_another_one_and_takes_part_again_when_it_comes_back(
    tmp_path,
):
    settings = service_settings(tmp_path, federation={"wearable_lease_s": 4.0})
    async with running_service(settings) as service:
        anna, ben, cleo = [await enrolled_device(service, name) for name in ("anna", "ben", "cleo")]
        run_id = await asyncio.to_thread(begin_run, settings, SHAPES, rounds=1, min_clients=2, quorum=3)
        tasks = await asyncio.gather(anna.task(), ben.task())

        async def busy() -> None:
            while await ben.report(tasks[1]):  # noqa: ASYNC110 - a device at work
                await asyncio.sleep(0.1)

        working = asyncio.create_task(busy())
        third = await cleo.task()  # anna says nothing for 6 s
        assert third.round == 1
        state = open_state(settings)

        def stored() -> Round:
            with state.database.read() as connection:
                return Round.from_dict(list_rounds(connection, run_id)[0].snapshot)

        assert stored().lost == (anna.device_id,)
        assert await anna.report(tasks[0])
        assert stored().lost == ()
        for device, task in ((anna, tasks[0]), (cleo, third), (ben, tasks[1])):
            receipt = await device.answer(task, 1.0)
            assert receipt.status == federation_pb2.RECEIPT_STATUS_ACCEPTED
        await until(lambda: stored().state == "published")
        assert len(stored().receipts) == 3
        state.database.close()
        await working
        for device in (anna, ben, cleo):
            await device.close()
