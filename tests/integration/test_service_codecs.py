"""Coded updates at a real service: decoded before they count, and refused when they are not what they say."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from service_harness import (
    begin_run,
    echo_plan,
    enrolled_device,
    global_tensors,
    running_service,
    service_settings,
    until,
)
from wearfleet_cloud.service.state import open_state
from wearfleet_protos.codecs import Residual, UpdateCodec
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import digest_of, encode_tensors
from wearfleet_protos.v1 import federation_pb2

SHAPES = {"w": (40, 30), "b": (4,)}
CODECS = {
    "int8": UpdateCodec("int8"),
    "topk": UpdateCodec("topk", fraction=0.1),
    "randk": UpdateCodec("randk", fraction=0.1),
    "powersgd": UpdateCodec("powersgd", rank=2),
}


def update_of(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(0, 1e-2, shape).astype(np.float32) for name, shape in SHAPES.items()}


def coded(codec: UpdateCodec, task, seed: int) -> bytes:
    update_format = echo_plan(SHAPES, codec).update_format()
    return update_format.encode(
        update_of(seed), Residual(), round_number=task.round, client=task.attempt_id
    ).data


def globals_of(settings, run_id: str) -> dict[str, np.ndarray]:
    state = open_state(settings)
    try:
        return global_tensors(state, run_id)
    finally:
        state.database.close()


async def closed(settings, run_id: str) -> dict[str, np.ndarray]:
    """The global tensors once the first round is folded."""
    await until(lambda: np.abs(globals_of(settings, run_id)["b"]).max() > 0)
    return globals_of(settings, run_id)


@pytest.mark.parametrize("name", CODECS)
async def test_the_mean_is_of_what_was_decoded(tmp_path, name):
    codec, settings = CODECS[name], service_settings(tmp_path)
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, n) for n in ("anna", "ben")]
        run_id = await asyncio.to_thread(begin_run, settings, SHAPES, rounds=1, min_clients=2, codec=codec)
        tasks = await asyncio.gather(*(device.task() for device in devices))
        sent = [coded(codec, task, seed) for seed, task in enumerate(tasks)]
        for device, task, data in zip(devices, tasks, sent, strict=True):
            receipt = await device.submit(task, digest_of(data), data)
            assert receipt.status == federation_pb2.RECEIPT_STATUS_ACCEPTED, receipt.reason
        found = await closed(settings, run_id)
        for device in devices:
            await device.close()
    update_format = echo_plan(SHAPES, codec).update_format()
    decoded = [update_format.decode(data) for data in sent]
    for tensor in SHAPES:
        # equal weights; the mean is made in float64 and rounded once to float32
        wanted = (decoded[0][tensor].astype(np.float64) + decoded[1][tensor]) / 2
        np.testing.assert_allclose(found[tensor], wanted, rtol=2.0**-23, atol=0)


async def test_updates_that_are_not_what_the_codec_says_are_rejected_and_the_round_goes_on(tmp_path):
    codec, settings = CODECS["topk"], service_settings(tmp_path)
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, n) for n in ("anna", "ben")]
        run_id = await asyncio.to_thread(
            begin_run, settings, SHAPES, rounds=1, min_clients=2, quorum=1, codec=codec
        )
        one, other = await asyncio.gather(*(device.task() for device in devices))
        good = coded(codec, one, 0)
        too_long = good + bytes(1 << 20)
        cases = {
            "begins with": encode_tensors(update_of(0)),
            "at most": too_long,
            "has": good[:-1] + b"\xff",
            "ends at byte": good[:40],
        }
        for reason, data in cases.items():
            receipt = await devices[0].submit(one, digest_of(data), data)
            assert receipt.status == federation_pb2.RECEIPT_STATUS_REJECTED
            assert reason in receipt.reason
        for device, task, data in ((devices[0], one, good), (devices[1], other, coded(codec, other, 1))):
            receipt = await device.submit(task, digest_of(data), data)
            assert receipt.status == federation_pb2.RECEIPT_STATUS_ACCEPTED, receipt.reason
        assert np.abs((await closed(settings, run_id))["w"]).max() > 0
        for device in devices:
            await device.close()


async def test_a_service_that_was_stopped_decodes_from_its_disk(tmp_path):
    codec, settings = CODECS["int8"], service_settings(tmp_path)
    async with running_service(settings) as service:
        anna, ben = [await enrolled_device(service, n) for n in ("anna", "ben")]
        run_id = await asyncio.to_thread(begin_run, settings, SHAPES, rounds=1, min_clients=2, codec=codec)
        one, other = await asyncio.gather(anna.task(), ben.task())
        first = coded(codec, one, 0)
        assert (await anna.submit(one, digest_of(first), first)).status == (
            federation_pb2.RECEIPT_STATUS_ACCEPTED
        )
        await anna.close()
        await ben.close()
    async with running_service(settings):
        second = coded(codec, other, 1)
        await ben.submit(other, digest_of(second), second)
        found = await closed(settings, run_id)
        await ben.close()
    update_format = echo_plan(SHAPES, codec).update_format()
    wanted = (update_format.decode(first)["w"].astype(np.float64) + update_format.decode(second)["w"]) / 2
    np.testing.assert_allclose(found["w"], wanted, rtol=2.0**-23, atol=0)


def test_a_plan_with_another_codec_than_the_options_say_is_not_started(tmp_path, monkeypatch):
    settings = service_settings(tmp_path)
    open_state(settings).database.close()
    monkeypatch.setattr("service_harness.codec_options", lambda _: {"codec": "int8"})
    with pytest.raises(ConfigError, match="--set codec"):
        begin_run(settings, SHAPES, rounds=1, min_clients=1, codec=CODECS["topk"])
