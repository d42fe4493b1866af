"""The service as a process, killed once at each state of a round: it goes on, and nothing is counted twice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from mortal_programs import deaths, write_program
from service_harness import (
    begin_run,
    enrolled_device,
    fixed_ports,
    global_tensors,
    running_service,
    service_settings,
)
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.run_records import find_run, list_rounds, list_submissions
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


def start(program: str, settings: Settings) -> subprocess.Popen[bytes]:
    service = settings.service
    ports = {"port": service.port, "enrol-port": service.enrol_port, "web-port": service.web_port}
    flags = [word for name, port in ports.items() for word in (f"--{name}", str(port))]
    command = [program, "serve", "--state", str(service.state_dir), *flags]
    command += ["--broker-port", str(settings.broker.port)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def end_broker(settings: Settings) -> None:
    with suppress(OSError, ValueError):  # it outlives a service that was killed
        os.kill(int((settings.service.state_dir / "broker" / "mosquitto.pid").read_text()), signal.SIGTERM)


async def take_part(device: Device, value: float, seconds: float) -> None:
    """Do every task in so many seconds, and do it again whenever the service is gone."""
    update = encode_tensors({name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()})
    while True:
        try:
            task = await device.poll(1.0)
            if task is not None:
                await asyncio.sleep(seconds)
                await device.submit(task, digest_of(update), update)
        except grpc.aio.AioRpcError:
            await device.close()
            await asyncio.sleep(0.1)


async def until_done(run_id: str, program: str, settings: Settings) -> None:
    """Start the service again whenever it has died, until the run has ended."""
    state, process = open_state(settings), start(program, settings)
    try:
        while True:
            with state.database.read() as connection:
                if find_run(connection, run_id).state != "running":
                    return
            if process.poll() is not None:
                assert process.returncode == -signal.SIGKILL
                process = start(program, settings)
            await asyncio.sleep(0.05)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)
        state.database.close()


@pytest.mark.timeout(400)
async def test_a_service_killed_at_each_state_of_a_round_goes_on_and_counts_nothing_twice(
    tmp_path: Path,
) -> None:
    settings = service_settings(tmp_path / "state")
    async with running_service(settings) as service:  # only to learn free ports and to enrol
        settings = fixed_ports(settings, service)
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
