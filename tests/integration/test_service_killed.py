"""The service as a process, killed once at each state of a round: it goes on, and nothing is counted twice."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from functools import partial
from itertools import chain, repeat
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from mortal_programs import deaths, write_program
from service_harness import (
    begin_run,
    enrolled_device,
    global_tensors,
    running_service,
    service_settings,
)
from service_process import end_broker, start_process
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.run_records import find_run, list_rounds, list_submissions, stop_run
from wearfleet_protos.tensors import digest_of, encode_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from service_harness import Device
    from wearfleet_cloud.config import Settings

pytestmark = [pytest.mark.broker, pytest.mark.e2e]

SHAPES = {"a": (3, 4)}
STATES = (
    "planned",
    "running",
    "before-the-commit-of-an-update",
    "running-with-an-update",
    "aggregating-with-an-update",
    "folded",
    "published-with-an-update",
)
"""In the first round: right after a transaction, unless the name says something else."""
ROUNDS = 2


async def take_part(device: Device, value: float, *seconds: float) -> None:
    """Do the first tasks in so many seconds, later ones like the last of these; again whenever the service is gone."""
    waits = chain(seconds, repeat(seconds[-1]))
    update = encode_tensors({name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()})
    while True:
        try:
            task = await device.poll(1.0)
            if task is not None:
                await asyncio.sleep(next(waits))
                await device.submit(task, digest_of(update), update)
        except grpc.aio.AioRpcError:
            await device.close()
            await asyncio.sleep(0.1)


async def until_done(run_id: str, program: str, settings: Settings, stopped: str = "") -> None:
    """Start the service again whenever it has died, until the run has ended; stop another one once it is its turn."""
    state, process = open_state(settings), start_process(settings, (program,))
    try:
        while True:
            with state.database.read() as connection:
                if find_run(connection, run_id).state != "running":
                    return
                due = stopped and list_rounds(connection, stopped)
            if due:
                await state.database.run(
                    partial(stop_run, run_id=stopped, now_ns=time.time_ns(), reason="enough")
                )
                stopped = ""
            if process.poll() is not None:
                assert process.returncode == -signal.SIGKILL
                process = start_process(settings, (program,))
            await asyncio.sleep(0.05)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)
        state.database.close()


async def test_a_service_killed_at_each_state_of_a_round_goes_on_and_counts_nothing_twice(
    tmp_path: Path,
) -> None:
    settings = service_settings(tmp_path / "state")
    async with running_service(settings) as service:  # only to enrol
        devices = [await enrolled_device(service, name) for name in ("anna", "ben")]
    run_id = await asyncio.to_thread(
        begin_run, settings, SHAPES, rounds=ROUNDS, min_clients=2, quorum=2, deadline_s=200.0
    )
    program = write_program(tmp_path / "mortal", "cloud", STATES)
    anna, ben = devices  # ben is slower, so that there is a state with one update
    work = [asyncio.create_task(take_part(*of)) for of in ((anna, 1.0, 0.0), (ben, 3.0, 1.0))]
    try:
        await until_done(run_id, program, settings)
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        end_broker(settings)
    assert deaths(program) == sorted(STATES)
    state = open_state(settings)
    with state.database.read() as connection:
        assert find_run(connection, run_id).state == "done"
        assert [row.state for row in list_rounds(connection, run_id)] == ["published"] * ROUNDS
        counted = Counter((s.round, s.device_id) for s in list_submissions(connection, run_id))
    assert counted == {(r, d.device_id): 1 for r in range(1, ROUNDS + 1) for d in devices}
    assert np.all(global_tensors(state, run_id)["a"] == 2.0 * ROUNDS)  # the mean of 1 and 3, each round once
    state.database.close()
    for device in devices:
        await device.close()


async def test_a_service_killed_when_a_round_was_skipped_or_a_run_stopped_goes_on_with_the_next(
    tmp_path: Path,
) -> None:
    settings = service_settings(tmp_path / "state")
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, name) for name in ("anna", "ben")]
    begin = partial(asyncio.to_thread, begin_run, settings, SHAPES)
    skipping = await begin(rounds=2, min_clients=2, quorum=2, deadline_s=20.0)
    waiting = await begin(rounds=1, min_clients=3)  # there is no third device
    last = await begin(rounds=1, min_clients=2, quorum=2, deadline_s=100.0)
    points = ("skipped-with-an-update", "aborted")
    program = write_program(tmp_path / "mortal", "cloud", points)
    late = (22.0, 0.0)  # ben's first update comes when the round is over
    work = [asyncio.create_task(take_part(*of)) for of in ((devices[0], 1.0, 0.0), (devices[1], 3.0, *late))]
    try:
        await until_done(last, program, settings, stopped=waiting)
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        end_broker(settings)
    assert deaths(program) == sorted(points)
    state = open_state(settings)
    with state.database.read() as connection:
        ends = {run_id: find_run(connection, run_id).state for run_id in (skipping, waiting, last)}
        found = {run_id: [row.state for row in list_rounds(connection, run_id)] for run_id in ends}
        counted = Counter((s.run_id, s.round, s.device_id) for s in list_submissions(connection, last))
    assert ends == {skipping: "done", waiting: "stopped", last: "done"}
    assert found == {skipping: ["skipped", "published"], waiting: ["aborted"], last: ["published"]}
    assert counted == {(last, 1, device.device_id): 1 for device in devices}
    # the skipped round has left the old model, the mean of 1 and 3 came to it once
    assert np.all(global_tensors(state, skipping)["a"] == 2.0)
    assert np.all(global_tensors(state, last)["a"] == 2.0)
    state.database.close()
    for device in devices:
        await device.close()
