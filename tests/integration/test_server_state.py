"""What a strategy keeps on the server: stored with the round, there after a restart, untouched by a skipped round."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

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
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Contribution
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.round import Round, RoundPolicy
from wearfleet_cloud.service.run_context import RunSettings
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.run_records import list_rounds
from wearfleet_protos.tensors import Digest, decode_tensors, encode_tensors

pytestmark = pytest.mark.broker

SHAPES = {"a": (3, 4), "b": (5,)}
OPTIONS = {"server_learning_rate": 0.5, "beta1": 0.8}
PLAN = replace(echo_plan(SHAPES), strategy="fedadam", plan_id="fedadam-echo")


def begin(settings) -> str:
    run = RunSettings(4, CohortPolicy(0, 2), RoundPolicy(quorum=2), OPTIONS, personalise=False)
    return begin_plan(settings, PLAN, run)


def expected(rounds: list[tuple[float, float]], devices):
    """The same folds without a service."""
    strategy = create_strategy("fedadam", OPTIONS)
    tensors, state = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}, {}
    for shifts in rounds:
        moved = [{n: np.full(s, shift, np.float32) for n, s in SHAPES.items()} for shift in shifts]
        updates = [
            Contribution(d.device_id, 10, partial(lambda u: u, u))
            for d, u in zip(devices, moved, strict=True)
        ]
        folded = strategy.server(PLAN.tensors, tensors, state, updates)
        tensors, state = folded.tensors, folded.state
    return tensors, state


def stored_rounds(settings, run_id) -> list[Round]:
    state = open_state(settings)
    with state.database.read() as connection:
        rounds = [Round.from_dict(row.snapshot) for row in list_rounds(connection, run_id)]
    state.database.close()
    return rounds


async def play(devices, shifts) -> None:
    tasks = await asyncio.gather(*(device.task() for device in devices))
    await asyncio.gather(*(d.answer(t, s) for d, t, s in zip(devices, tasks, shifts, strict=True)))


async def test_moments_survive_a_restart_bit_for_bit_and_a_skipped_round_leaves_them(tmp_path):
    """Round 2 is skipped (a device declines and the quorum is two); the service restarts before round 3."""
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, name) for name in ("anna", "ben")]
        run_id = await asyncio.to_thread(begin, settings)
        await play(devices, (1.0, 3.0))
        tasks = await asyncio.gather(*(device.task() for device in devices))
        await devices[0].decline(tasks[0], "no power")
        await devices[1].answer(tasks[1], 7.0)
        await until(lambda: len(stored_rounds(settings, run_id)) == 3)
    async with running_service(settings):
        await play(devices, (-1.0, 0.5))
        await play(devices, (2.0, 2.0))
        await until(lambda: stored_rounds(settings, run_id)[-1].result)
    for device in devices:
        await device.close()
    first, skipped, third, last = stored_rounds(settings, run_id)
    assert [r.state for r in (first, skipped, third, last)] == [
        "published",
        "skipped",
        "published",
        "published",
    ]
    assert (first.base_state, skipped.result_state) == ("", "")
    assert first.result_state == skipped.base_state == third.base_state
    state = open_state(settings)
    tensors, moments = expected([(1.0, 3.0), (-1.0, 0.5), (2.0, 2.0)], devices)
    assert state.blobs.read(Digest(last.result_state)) == encode_tensors(moments)
    assert decode_tensors(state.blobs.read(Digest(last.result_state)))["aggregations"] == 3
    assert encode_tensors(global_tensors(state, run_id)) == encode_tensors(tensors)
    state.database.close()
