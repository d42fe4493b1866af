"""Differences at a real service: every device gets the round's tensors to the bit, by what it says that it holds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest
from service_harness import (
    begin_run,
    echo_plan,
    enrolled_device,
    running_service,
    service_settings,
)
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Contribution
from wearfleet_cloud.federated.broadcast import fold_broadcast
from wearfleet_protos.codecs import FLOAT32, MOST_STEPS, Turn, UpdateCodec
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import decode_tensors, digest_of, encode_tensors
from wearfleet_protos.v1 import federation_pb2

SHAPES = {"w": (40, 30), "b": (4,)}
WAYS = {
    "difference": (FLOAT32, {"downlink": "difference"}),
    "int8": (UpdateCodec("int8"), {"downlink": "int8"}),
    "topk": (
        UpdateCodec("topk", fraction=0.05, warmup_rounds=5),
        {"downlink": "topk", "downlink_fraction": 0.05},
    ),
}


def update_of(number: int, who: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(10 * number + who)
    return {name: generator.normal(0, 1e-2, shape).astype(np.float32) for name, shape in SHAPES.items()}


@dataclass
class Holder:
    """A device of the test with what it holds, and how its tensors came."""

    device: object
    form: object
    held: bytes = b""
    came: list[str] = field(default_factory=list)

    async def task(self):
        task = await self.device.task(*([digest_of(self.held)] if self.held else []))
        if task.difference_digest:
            assert task.held_digest == digest_of(self.held)
            data = await self.device.download(task.difference_digest)
            assert len(data) == task.difference_bytes < task.tensors_bytes
            tensors = encode_tensors(self.form.apply(decode_tensors(self.held), data))
            self.came.append("difference")
        elif task.held_digest:
            tensors = self.held
            self.came.append("nothing")
        else:
            tensors = await self.device.download(task.tensors_digest)
            self.came.append("whole")
        assert digest_of(tensors) == task.tensors_digest, "to the bit"
        self.held = tensors
        return task

    async def hand_in(self, task, number: int, who: int):
        update = encode_tensors(update_of(number, who))
        receipt = await self.device.submit(task, digest_of(update), update)
        assert receipt.status == federation_pb2.RECEIPT_STATUS_ACCEPTED, receipt.reason


class Expected:
    """The same folds without a service."""

    def __init__(self, plan, options) -> None:
        self.plan, self.strategy = plan, create_strategy("fedavg", options)
        self.tensors = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        self.state: dict[str, np.ndarray] = {}

    def fold(self, number: int, names) -> None:
        parts = [
            Contribution(name, 10, lambda who=who: update_of(number, who), 1)
            for who, name in enumerate(names)
        ]
        folded = fold_broadcast(
            self.strategy, self.plan.tensors, self.tensors, self.state, parts, Turn(self.plan.seed, number)
        )
        self.tensors, self.state = folded.tensors, folded.state


@pytest.mark.parametrize("name", WAYS)
async def test_a_device_gets_differences_and_the_whole_after_it_lost_its_copy(tmp_path, name):
    codec, options = WAYS[name]
    settings, rounds = service_settings(tmp_path), MOST_STEPS + 4
    plan = echo_plan(SHAPES, downlink=codec)
    expected = Expected(plan, options)
    async with running_service(settings) as service:
        anna = Holder(await enrolled_device(service, "anna"), plan.download_format())
        await asyncio.to_thread(
            begin_run, settings, SHAPES, rounds=rounds, min_clients=1, downlink=codec, options=options
        )
        for number in range(1, rounds + 1):
            task = await anna.task()
            assert task.round == number
            assert anna.held == encode_tensors(expected.tensors)
            if number == 4:
                anna.held = b""
            await anna.hand_in(task, number, 0)
            expected.fold(number, [anna.device.device_id])
        await anna.device.close()
    assert anna.came == ["whole", *["difference"] * 3, "whole", *["difference"] * (rounds - 5)]


@pytest.mark.parametrize("name", WAYS)
async def test_a_restart_in_mid_run_keeps_the_ring_and_who_was_away_too_long_gets_the_whole(tmp_path, name):
    codec, options = WAYS[name]
    settings, rounds = service_settings(tmp_path), MOST_STEPS + 3
    plan = echo_plan(SHAPES, downlink=codec)
    expected = Expected(plan, options)
    versions = [encode_tensors(expected.tensors)]
    async with running_service(settings) as service:
        anna = Holder(await enrolled_device(service, "anna"), plan.download_format())
        await asyncio.to_thread(
            begin_run, settings, SHAPES, rounds=rounds, min_clients=1, downlink=codec, options=options
        )
        for number in range(1, rounds):
            await anna.hand_in(await anna.task(), number, 0)
            expected.fold(number, [anna.device.device_id])
            versions.append(encode_tensors(expected.tensors))
    async with running_service(settings):
        newest = len(versions) - 1
        for missed, came in ((0, "nothing"), (1, "difference"), (3, None), (MOST_STEPS + 1, "whole")):
            back = Holder(anna.device, plan.download_format(), versions[newest - missed])
            await back.task()
            assert back.held == versions[newest]
            assert back.came[0] in ([came] if came else ["difference", "whole"])
        task = await anna.task()
        assert anna.came[-1] == "difference"
        other = await anna.device.submit(
            task,
            digest_of(encode_tensors(update_of(9, 0))),
            encode_tensors(update_of(9, 0)),
            base_digest=digest_of(versions[0]),
        )
        assert other.status == federation_pb2.RECEIPT_STATUS_REJECTED, "another base is refused as before"
        await anna.device.close()


async def test_what_a_device_claims_to_hold_is_only_compared(tmp_path):
    settings = service_settings(tmp_path)
    codec, options = WAYS["difference"]
    async with running_service(settings) as service:
        anna = await enrolled_device(service, "anna")
        await asyncio.to_thread(
            begin_run, settings, SHAPES, rounds=1, min_clients=1, downlink=codec, options=options
        )
        odd = [
            "",
            "sha256:" + "0" * 64,
            "../../etc/passwd",
            "x" * 10_000,
            *[f"sha256:{n:064x}" for n in range(50)],
        ]
        task = await anna.task(*odd)
        assert (task.held_digest, task.difference_digest, task.difference_bytes) == ("", "", 0)
        await anna.close()


async def test_options_and_plan_must_agree_on_the_downlink(tmp_path):
    settings = service_settings(tmp_path)
    async with running_service(settings):
        for codec, options in ((FLOAT32, {}), (None, {"downlink": "difference"})):
            with pytest.raises(ConfigError, match="give the same --set downlink"):
                await asyncio.to_thread(
                    begin_run, settings, SHAPES, rounds=1, min_clients=1, downlink=codec, options=options
                )
