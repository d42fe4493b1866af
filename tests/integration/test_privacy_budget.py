"""A device's privacy over the service: entered once, also over a restart; over budget it is not asked."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import typer
from service_harness import (
    begin_plan,
    echo_plan,
    enrolled_device,
    running_service,
    service_settings,
    until,
)
from sqlalchemy import select
from typer.testing import CliRunner
from wearfleet_cloud.cli import devices as devices_cli
from wearfleet_cloud.cli import federation as federation_cli
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.privacy.accounting import Spend, epsilon_of
from wearfleet_cloud.federated.privacy.options import RECORD_CLIP, RECORD_SIGMA
from wearfleet_cloud.federated.round import Round, RoundPolicy
from wearfleet_cloud.service.run_context import RunSettings
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.run_records import list_rounds
from wearfleet_cloud.storage.tables import privacy_spends
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.plan import Loop
from wearfleet_protos.tensors import decode_tensors, digest_of, encode_tensors
from wearfleet_protos.v1 import federation_pb2

pytestmark = pytest.mark.broker

SHAPES = {"a": (3, 4), "b": (5,)}
PLAN = replace(echo_plan(SHAPES), strategy="fedavg", plan_id="private-echo")
TWO_ROUNDS = epsilon_of([Spend(3.0, 1.0, 2)], 1e-5)
OPTIONS = {
    "dp": "central",
    "noise_multiplier": 3.0,
    "clip": 0.5,
    "expected_cohort": 30,
    "adaptive_clip": "on",
    "count_noise": 2.0,
    "max_epsilon": TWO_ROUNDS * (1 + 1e-9),
}


RECORD = Spend(1.5, 0.2, 5, "record")
RECORD_OPTIONS = {
    "dp": "record",
    "noise_multiplier": 1.5,
    "clip": 0.5,
    "sampling_rate": 0.2,
    "record_steps": 5,
    "max_epsilon": epsilon_of([replace(RECORD, count=10)], 1e-5) * (1 + 1e-9),
}
NOISED = replace(
    PLAN.phases[0],
    loop=Loop("train", 8, 1, 5, shuffle=False, sampling_rate=0.2),
    scalars=((RECORD_CLIP, 0.5), (RECORD_SIGMA, 0.75)),
    noise=17,
)


def begin(settings, plan=PLAN, options=OPTIONS) -> str:
    run = RunSettings(9, CohortPolicy(0, 2), RoundPolicy(quorum=2), options, personalise=False)
    return begin_plan(settings, plan, run)


def stored(settings, run_id) -> tuple[list[Round], set[tuple[int, str]]]:
    """Rounds, and (round, device) of every entry."""
    state = open_state(settings)
    with state.database.read() as connection:
        rounds = [Round.from_dict(row.snapshot) for row in list_rounds(connection, run_id)]
        entries = {(r.round, r.device_id) for r in connection.execute(select(privacy_spends))}
    state.database.close()
    return rounds, entries


async def play(devices, shifts) -> None:
    tasks = await asyncio.gather(*(device.task() for device in devices))
    await asyncio.gather(*(d.answer(t, s) for d, t, s in zip(devices, tasks, shifts, strict=True)))


async def test_a_round_is_entered_once_and_over_budget_a_device_is_not_asked(tmp_path):
    """Round 1 is published, 2 skipped (nothing spent), the service restarts in round 3, and round 4 asks nobody."""
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, name) for name in ("anna", "ben")]
        run_id = await asyncio.to_thread(begin, settings)
        await play(devices, (1.0, 3.0))
        tasks = await asyncio.gather(*(device.task() for device in devices))
        both = {device.device_id for device in devices}
        assert stored(settings, run_id)[1] == {
            (n, d) for n in (1, 2) for d in both
        }  # before the plan is handed out
        await devices[0].decline(tasks[0], "no power")
        await devices[1].answer(tasks[1], 7.0)
        await until(lambda: len(stored(settings, run_id)[0]) == 3)
        assert stored(settings, run_id)[1] == {(n, d) for n in (1, 3) for d in both}
    async with running_service(settings):
        await play(devices, (-1.0, 0.5))
        await until(lambda: len(stored(settings, run_id)[0]) == 4)
        for device in devices:
            await device.close()
    rounds, entries = stored(settings, run_id)
    assert [r.state for r in rounds] == ["published", "skipped", "published", "planned"]
    assert entries == {(n, d) for n in (1, 3) for d in both}
    _shows_why(settings, run_id, both)
    _keeps_the_clip(settings, rounds)


async def test_noised_steps_are_charged_once_to_whoever_is_invited(tmp_path):
    """Anna hands in twice, then declines: a skipped round stays charged, and a third would exceed the budget."""
    settings = service_settings(tmp_path)
    async with running_service(settings) as service:
        devices = [await enrolled_device(service, name) for name in ("anna", "ben")]
        both = {device.device_id for device in devices}
        run_id = await asyncio.to_thread(begin, settings, replace(PLAN, phases=(NOISED,)), RECORD_OPTIONS)
        tasks = await asyncio.gather(*(device.task() for device in devices))
        assert stored(settings, run_id)[1] == {(1, d) for d in both}  # before anything is handed in
        await devices[0].answer(tasks[0], 1.0)
        update = encode_tensors({name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})
        again = await devices[0].submit(tasks[0], digest_of(update))
        assert again.status == federation_pb2.RECEIPT_STATUS_DUPLICATE
        await devices[1].answer(tasks[1], 1.0)
        tasks = await asyncio.gather(*(device.task() for device in devices))
        await devices[0].decline(tasks[0], "no power")
        await devices[1].answer(tasks[1], 7.0)
        await until(lambda: len(stored(settings, run_id)[0]) == 3)
    async with running_service(settings):
        for device in devices:
            await device.close()
    rounds, entries = stored(settings, run_id)
    assert [r.state for r in rounds] == ["published", "skipped", "planned"]
    assert entries == {(n, d) for n in (1, 2) for d in both}
    shown = _calls(settings)("devices", "show", min(both))["privacy"]
    assert shown["record"]["epsilon"] == pytest.approx(
        epsilon_of([replace(RECORD, count=10)], 1e-5), rel=1e-12
    )
    assert (shown["record"]["rounds"], shown["client"]["rounds"], shown["client"]["epsilon"]) == (2, 0, 0.0)
    assert "record-level epsilon" in shown["not_asked"][run_id]
    text = _printed(settings, "devices", "show", min(both))
    assert "client-level privacy" in text
    assert f"epsilon {shown['record']['epsilon']:.3g} at delta 1e-05, 2 rounds" in text


def test_a_run_whose_plan_has_other_noised_steps_than_its_options_is_not_begun(tmp_path):
    weak = replace(NOISED, scalars=((RECORD_CLIP, 0.5), (RECORD_SIGMA, 0.1)))
    with pytest.raises(ConfigError, match="same --set"):
        begin(service_settings(tmp_path), replace(PLAN, phases=(weak,)), RECORD_OPTIONS)


def _printed(settings, *words: str) -> str:
    app = typer.Typer()
    devices_cli.register(app)
    federation_cli.register(app)
    arguments = [*words, "--state", str(settings.service.state_dir)]
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments, catch_exceptions=False).output


def _calls(settings):
    return lambda *words: json.loads(_printed(settings, *words, "--json"))


def _shows_why(settings, run_id: str, devices: set[str]) -> None:
    call = _calls(settings)
    shown = call("devices", "show", min(devices))["privacy"]
    assert shown["client"]["epsilon"] == pytest.approx(TWO_ROUNDS, rel=1e-12)
    assert (shown["client"]["delta"], shown["client"]["rounds"]) == (1e-5, 2)
    assert shown["record"] == {"epsilon": 0.0, "delta": 1e-5, "rounds": 0}
    assert "privacy budget" in shown["not_asked"][run_id]
    assert call("federation", "status", run_id)["not_asked"].keys() == devices


def _keeps_the_clip(settings, rounds: list[Round]) -> None:
    """The clip and the number of noised rounds are stored with the round, and a skipped one leaves them."""
    state = open_state(settings)
    first, skipped, third, _ = rounds
    assert first.result_state == skipped.base_state == third.base_state
    kept = [decode_tensors(state.blobs.read(r.result_state)) for r in (first, third)]
    assert [int(k["privacy/rounds"]) for k in kept] == [1, 2]
    assert kept[0]["privacy/clip"] not in (0.5, kept[1]["privacy/clip"])
    state.database.close()
