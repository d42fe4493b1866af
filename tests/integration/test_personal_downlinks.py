"""A strategy that makes a model for each client, through the service: everyone gets its own, also after a restart."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from service_harness import (
    begin_plan,
    echo_plan,
    enrolled_device,
    running_service,
    service_settings,
    until,
)
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Contribution
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.round import RoundPolicy
from wearfleet_cloud.service.run_context import RunSettings
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.run_records import find_run, list_rounds
from wearfleet_protos.tensors import (
    Digest,
    TensorGroup,
    TensorRole,
    TensorSpec,
    decode_tensors,
    digest_of,
    encode_tensors,
)
from wearfleet_protos.v1 import federation_pb2

pytestmark = pytest.mark.broker

OPTIONS = {"warmup_rounds": 1, "own_weight": 0.4}
STRATEGY = create_strategy("fedap", OPTIONS)
_ECHO = echo_plan({"a": (3, 4), "b": (5,)})
PLAN = replace(
    _ECHO,
    strategy="fedap",
    plan_id="fedap-echo",
    tensors=(
        *_ECHO.tensors,
        *(
            TensorSpec(f"statistics/0/{kind}", "float32", (2,), TensorRole.AUX, TensorGroup.AUX, "zeros")
            for kind in ("mean", "variance")
        ),
    ),
    upload=STRATEGY.info.upload(),
)
NAMES = ("anna", "ben", "cleo")
ROUNDS = 3


def begin(settings) -> str:
    run = RunSettings(ROUNDS, CohortPolicy(0, 3), RoundPolicy(quorum=3), OPTIONS, personalise=True)
    return begin_plan(settings, PLAN, run)


def update_of(number: int, who: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(10 * number + who)
    return {s.name: generator.random(s.shape).astype(np.float32) for s in PLAN.upload_specs()}


class Expected:
    """The same folds without a service."""

    def __init__(self, devices) -> None:
        self.ids = [device.device_id for device in devices]
        self.tensors = {s.name: np.zeros(s.shape, s.dtype) for s in PLAN.download_specs()}
        self.state: dict[str, np.ndarray] = {}

    def fold(self, number: int) -> None:
        parts = [
            Contribution(name, 10, lambda who=who: update_of(number, who), 1)
            for who, name in enumerate(self.ids)
        ]
        folded = STRATEGY.server(PLAN.tensors, self.tensors, self.state, parts)
        self.tensors, self.state = folded.tensors, folded.state

    def downlinks(self) -> list[bytes]:
        return [encode_tensors(STRATEGY.received(name, self.tensors, self.state)) for name in self.ids]


async def tasks_of(devices):
    return list(await asyncio.gather(*(device.task() for device in devices)))


async def hand_in(device, task, number: int, who: int, **changes):
    update = encode_tensors(update_of(number, who))
    return await device.submit(task, digest_of(update), update, **changes)


async def test_everyone_gets_its_own_model_in_every_round_and_after_a_restart_in_mid_round(tmp_path):
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, name) for name in NAMES]
        expected = Expected(devices)
        run_id = await asyncio.to_thread(begin, settings)
        first = await tasks_of(devices)
        assert len({task.tensors_digest for task in first}) == 1
        for who, device in enumerate(devices):
            await hand_in(device, first[who], 1, who)
        expected.fold(1)
        second = await tasks_of(devices)
        downlinks = [await d.download(t.tensors_digest) for d, t in zip(devices, second, strict=True)]
        assert downlinks == expected.downlinks()
        assert len(set(downlinks)) == 3
        await hand_in(devices[0], second[0], 2, 0)
    async with running_service(settings):
        again = await tasks_of(devices[1:])
        assert [t.tensors_digest for t in again] == [t.tensors_digest for t in second[1:]]
        assert [
            await d.download(t.tensors_digest) for d, t in zip(devices[1:], again, strict=True)
        ] == downlinks[1:]
        refused = await hand_in(devices[1], again[0], 2, 1, base_digest=second[0].tensors_digest)
        assert refused.status == federation_pb2.RECEIPT_STATUS_REJECTED
        assert "started from" in refused.reason
        for who in (1, 2):
            receipt = await hand_in(devices[who], second[who], 2, who)
            assert receipt.status == federation_pb2.RECEIPT_STATUS_ACCEPTED
        expected.fold(2)
        third = await tasks_of(devices)
        assert [
            await d.download(t.tensors_digest) for d, t in zip(devices, third, strict=True)
        ] == expected.downlinks()
        for who, device in enumerate(devices):
            await hand_in(device, third[who], 3, who)
        expected.fold(3)
        last = await tasks_of(devices)
        assert {task.kind for task in last} == {federation_pb2.TASK_KIND_PERSONALISE}
        assert [
            await d.download(t.tensors_digest) for d, t in zip(devices, last, strict=True)
        ] == expected.downlinks()
        for device, task in zip(devices, last, strict=True):
            await device.answer(task, 0.0)

        def done() -> bool:
            state = open_state(settings)
            with state.database.read() as connection:
                row = find_run(connection, run_id)
                rounds = list_rounds(connection, run_id)
            kept = [state.blobs.has(Digest(task.tensors_digest)) for task in third]
            tensors = decode_tensors(state.blobs.read(Digest(row.tensors_digest)))
            state.database.close()
            if row.state != "done":
                return False
            assert [r.state for r in rounds] == ["published"] * 4
            assert kept == [False] * 3, "models of past rounds are thrown away"
            assert encode_tensors(tensors) == encode_tensors(expected.tensors)
            return True

        await until(done)
        for device in devices:
            await device.close()
