"""The service as a process, and updates that come twice, at the same moment, after later ones, and too late."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

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
from service_process import end_broker, start_ready
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.run_records import find_run, list_rounds, list_submissions
from wearfleet_protos.tensors import digest_of, encode_tensors
from wearfleet_protos.v1 import federation_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from service_harness import Device

pytestmark = [pytest.mark.broker, pytest.mark.e2e]

SHAPES = {"a": (3, 4)}
VALUES = {"anna": 1.0, "ben": 3.0, "cleo": 5.0}
ROUNDS, LATE_IN = 4, 2
ACCEPTED = federation_pb2.RECEIPT_STATUS_ACCEPTED
DUPLICATE = federation_pb2.RECEIPT_STATUS_DUPLICATE
STALE = federation_pb2.RECEIPT_STATUS_STALE

Task = federation_pb2.FederatedTask


class Sender:
    """A device that remembers its tasks and hands its one update in whenever it is told to."""

    def __init__(self, device: Device, value: float) -> None:
        self.device, self.tasks = device, list[Task]()
        self._update = encode_tensors({n: np.full(s, value, np.float32) for n, s in SHAPES.items()})

    async def take(self, number: int) -> None:
        """The task of a round; who owes an earlier one is given that again as long as it can be done."""
        while True:
            task = await self.device.task()
            if task.round == number:
                break
            await asyncio.sleep(0.1)
        self.tasks.append(task)

    async def hand_in(self, number: int, times: int = 1) -> Counter[int]:
        """What is answered to so many copies for a round, all sent at the same moment."""
        task, digest = self.tasks[number - 1], digest_of(self._update)
        copies = (self.device.submit(task, digest, self._update) for _ in range(times))
        return Counter(receipt.status for receipt in await asyncio.gather(*copies))


async def play(anna: Sender, ben: Sender, cleo: Sender) -> None:
    """All rounds: anna sends each update three times at once, ben's copies overtake one another, cleo is late once."""
    for number in range(1, ROUNDS + 1):
        await asyncio.gather(*(sender.take(number) for sender in (anna, ben, cleo)))
        assert await anna.hand_in(number, 3) == {ACCEPTED: 1, DUPLICATE: 2}
        for old in range(1, number):  # a copy that the network held back comes after all that followed it
            assert await ben.hand_in(old) == {DUPLICATE: 1}
        if number == LATE_IN + 1:
            assert await cleo.hand_in(LATE_IN, 2) == {STALE: 2}
        if number != LATE_IN:
            assert await cleo.hand_in(number) == {ACCEPTED: 1}
        assert await ben.hand_in(number) == {ACCEPTED: 1}


async def test_updates_that_come_twice_out_of_order_or_late_count_once_or_not_at_all(tmp_path: Path) -> None:
    settings = service_settings(tmp_path / "state")
    async with running_service(settings) as service:  # only to enrol
        devices = [await enrolled_device(service, name) for name in VALUES]
    run_id = await asyncio.to_thread(
        begin_run, settings, SHAPES, rounds=ROUNDS, min_clients=3, quorum=2, deadline_s=15.0
    )
    process, state = await asyncio.to_thread(start_ready, settings), open_state(settings)

    def done() -> bool:
        with state.database.read() as connection:
            return find_run(connection, run_id).state == "done"

    try:
        await play(*(Sender(d, v) for d, v in zip(devices, VALUES.values(), strict=True)))
        await until(done)
        with state.database.read() as connection:
            states = [row.state for row in list_rounds(connection, run_id)]
            counted = Counter((s.round, s.device_id) for s in list_submissions(connection, run_id))
        assert states == ["published"] * ROUNDS
        late = (LATE_IN, devices[-1].device_id)
        everyone = {(n, d.device_id): 1 for n in range(1, ROUNDS + 1) for d in devices}
        assert counted == {who: 1 for who in everyone if who != late}
        # means of 1, 3 and 5, and of 1 and 3 where the last came too late
        assert np.all(global_tensors(state, run_id)["a"] == 3.0 * (ROUNDS - 1) + 2.0)
    finally:
        for device in devices:
            await device.close()
        process.terminate()
        await asyncio.to_thread(process.wait)
        end_broker(settings)
        state.database.close()
