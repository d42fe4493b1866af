"""Federated rounds through real gRPC with mutual TLS."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from service_harness import begin_run, enrolled_device, global_tensors, running_service, service_settings, until
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.run_records import find_run, list_rounds, list_submissions
from wearfleet_protos.v1 import federation_pb2

pytestmark = pytest.mark.broker

SHAPES = {"a": (3, 4), "b": (5,)}


async def test_a_run_averages_what_its_devices_send_and_ends_with_personalisation(tmp_path):
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, name) for name in ("anna", "ben")]
        run_id = await asyncio.to_thread(begin_run, settings, SHAPES, rounds=2, min_clients=2, personalise=True)
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
