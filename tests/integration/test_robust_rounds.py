"""Robust rules on a real service: who is pointed at, skipped rounds, and attackers with certificates of their own."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import sqlalchemy as sa
import typer
from service_harness import (
    begin_run,
    enrolled_device,
    global_tensors,
    running_service,
    service_settings,
    until,
)
from typer.testing import CliRunner
from wearfleet_cloud.cli.devices import register as devices_register
from wearfleet_cloud.cli.federation import register as federation_register
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.audit import verify_audit
from wearfleet_cloud.storage.run_records import list_rounds
from wearfleet_cloud.storage.suspicions import Suspicion, list_suspicions
from wearfleet_cloud.storage.tables import audit
from wearfleet_protos.tensors import digest_of, encode_tensors
from wearfleet_protos.v1 import federation_pb2

pytestmark = pytest.mark.broker

SHAPES = {"a": (3, 4), "b": (5,)}
NAMES = ("anna", "ben", "cleo", "dora", "eve")
ACCEPTED = federation_pb2.RECEIPT_STATUS_ACCEPTED


@pytest.fixture
async def five(tmp_path):
    """A service with five devices and what starts a run of theirs."""
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, name) for name in NAMES]
        state = open_state(settings)

        async def start(**changes) -> str:
            return await asyncio.to_thread(begin_run, settings, SHAPES, min_clients=5, **changes)

        yield SimpleNamespace(settings=settings, devices=devices, state=state, start=start)
        state.database.close()
        for device in devices:
            await device.close()


async def round_of(five, *shifts: float) -> list[int]:
    tasks = await asyncio.gather(*(device.task() for device in five.devices))
    receipts = await asyncio.gather(
        *(d.answer(t, shift) for d, t, shift in zip(five.devices, tasks, shifts, strict=True))
    )
    return [receipt.status for receipt in receipts]


def rows_of(five, run_id: str):
    with five.state.database.read() as connection:
        return list_rounds(connection, run_id)


async def ended(five, run_id: str, number: int) -> None:
    def over() -> bool:
        rows = rows_of(five, run_id)
        return len(rows) > number or rows[-1].state in ("published", "skipped")

    await until(over, 60.0)  # the first robust fold imports torch


async def test_a_median_bears_an_attacker_and_names_it(five) -> None:
    options = {"rule": "median", "attackers": 1}
    run_id = await five.start(rounds=3, options=options)
    eve = five.devices[-1].device_id
    for number in (1, 2, 3):
        assert await round_of(five, 1.0, 1.1, 0.9, 1.0, -5.0) == [ACCEPTED] * 5
        await ended(five, run_id, number)
    for array in global_tensors(five.state, run_id).values():
        np.testing.assert_allclose(array, 3.0, rtol=1e-6)
    for row in rows_of(five, run_id):
        (judged,) = row.snapshot["judged"]
        assert (judged["client"], judged["verdict"], judged["suspect"]) == (eve, "counted", True)
        assert "times the median distance" in judged["reason"]
        assert judged["norm"] == pytest.approx(5.0 * 17**0.5)
    with five.state.database.read() as connection:
        found = list_suspicions(connection)
        told = connection.execute(sa.select(audit).where(audit.c.action == "federation.suspect")).mappings()
        assert [row["subject"] for row in told] == [eve] * 3
        assert verify_audit(connection) > 3
    assert (found[eve].suspect, found[eve].rounds, found[eve].advised) == (3, 3, True)
    others = [found[device.device_id] for device in five.devices[:-1]]
    assert others == [Suspicion(0, 3)] * 4


async def test_the_memory_of_a_rule_outlives_the_service(five) -> None:
    run_id = await five.start(rounds=2, options={"rule": "median", "attackers": 1})
    await round_of(five, 1.0, 1.0, 1.0, 1.0, 1.0)
    await ended(five, run_id, 1)
    await round_of(five, 1.0, 1.0, 1.0, 1.0, 50.0)
    await ended(five, run_id, 2)
    (judged,) = rows_of(five, run_id)[1].snapshot["judged"]
    assert (judged["client"], judged["verdict"]) == (five.devices[-1].device_id, "refused")
    assert "10 times the running median" in judged["reason"]


async def test_a_round_below_the_bound_is_skipped_and_keeps_the_tensors(five) -> None:
    run_id = await five.start(rounds=1, options={"rule": "krum", "attackers": 1})
    before = global_tensors(five.state, run_id)
    assert await round_of(five, 1.0, 1.0, 1.0, 1.0, 500.0) == [ACCEPTED] * 5
    await ended(five, run_id, 1)
    (row,) = rows_of(five, run_id)
    assert row.state == "skipped"
    assert "needs at least 5 updates, 4 are left" in row.snapshot["reason"]
    assert [j["client"] for j in row.snapshot["judged"]] == [five.devices[-1].device_id]
    for name, array in global_tensors(five.state, run_id).items():
        np.testing.assert_array_equal(array, before[name])


async def test_a_refused_submission_is_evidence_too(five) -> None:
    run_id = await five.start(rounds=1)
    tasks = await asyncio.gather(*(device.task() for device in five.devices))
    bad = encode_tensors({name: np.full(shape, np.nan, np.float32) for name, shape in SHAPES.items()})
    await five.devices[0].upload(bad)
    receipt = await five.devices[0].submit(tasks[0], digest_of(bad))
    assert receipt.status == federation_pb2.RECEIPT_STATUS_REJECTED
    for device, task in zip(five.devices[1:], tasks[1:], strict=True):
        await device.answer(task, 1.0)
    await ended(five, run_id, 1)
    with five.state.database.read() as connection:
        suspicion = list_suspicions(connection)[five.devices[0].device_id]
    assert (suspicion.suspect, suspicion.rounds, suspicion.advised) == (1, 1, False)
    assert "NaN" in suspicion.reason


async def test_a_replayed_update_counts_once_and_an_old_one_not_at_all(five) -> None:
    run_id = await five.start(rounds=2)
    tasks = await asyncio.gather(*(device.task() for device in five.devices))
    eve, old = five.devices[-1], tasks[-1]
    update = encode_tensors({name: np.full(shape, 6.0, np.float32) for name, shape in SHAPES.items()})
    await eve.upload(update)
    statuses = [(await eve.submit(old, digest_of(update))).status for _ in range(5)]
    assert statuses == [ACCEPTED, *[federation_pb2.RECEIPT_STATUS_DUPLICATE] * 4]
    for device, task in zip(five.devices[:-1], tasks[:-1], strict=True):
        await device.answer(task, 1.0)
    await ended(five, run_id, 1)
    for array in global_tensors(five.state, run_id).values():
        np.testing.assert_allclose(array, 2.0)  # (4 x 1 + 6) / 5
    new = await eve.task()
    assert new.round == 2
    # the attempt of the first round again, now and as if it were of the second one
    assert (await eve.submit(old, digest_of(update))).status == federation_pb2.RECEIPT_STATUS_DUPLICATE
    other = encode_tensors({name: np.full(shape, 7.0, np.float32) for name, shape in SHAPES.items()})
    assert (await eve.submit(old, digest_of(other))).status == federation_pb2.RECEIPT_STATUS_STALE
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await eve.submit(new, digest_of(update), attempt_id=old.attempt_id)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert rows_of(five, run_id)[1].snapshot["receipts"] == []


async def test_a_device_cannot_speak_for_another_one(five) -> None:
    run_id = await five.start(rounds=1)
    tasks = await asyncio.gather(*(device.task() for device in five.devices))
    anna, eve = five.devices[0], five.devices[-1]
    update = encode_tensors({name: np.full(shape, 6.0, np.float32) for name, shape in SHAPES.items()})
    await eve.upload(update)
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # anna's task with eve's certificate
        await eve.submit(tasks[0], digest_of(update))
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # eve's bytes with anna's certificate
        await anna.submit(tasks[0], digest_of(update))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert rows_of(five, run_id)[0].snapshot["receipts"] == []
    assert (await anna.answer(tasks[0], 1.0)).status == ACCEPTED


async def test_operators_see_who_is_suspect(five) -> None:
    run_id = await five.start(rounds=1, options={"rule": "median", "attackers": 1})
    await round_of(five, 1.0, 1.1, 0.9, 1.0, -5.0)
    await ended(five, run_id, 1)
    app = typer.Typer()
    devices_register(app)
    federation_register(app)
    state = ["--state", str(five.settings.service.state_dir), "--json"]

    def call(*arguments: str):
        result = CliRunner().invoke(app, [*arguments, *state], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.output)

    listed = {row["name"]: row for row in await asyncio.to_thread(call, "devices", "list")}
    assert {name: row["suspect_rounds"] for name, row in listed.items()} == dict.fromkeys(NAMES, 0) | {
        "eve": 1
    }
    assert listed["eve"]["quarantine_advised"] is False
    put = await asyncio.to_thread(call, "devices", "quarantine", listed["eve"]["device_id"])
    assert put["quarantine_reason"].startswith("suspect in 1 of 1 rounds: ")
    status = await asyncio.to_thread(call, "federation", "status", run_id)
    (judged,) = status["rounds"][0]["judged"]
    assert judged["client"] == listed["eve"]["device_id"]
