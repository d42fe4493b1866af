"""Three sites, each a service with two devices of its own, in a ring over gRPC: the models are the oracle's."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from oracles.metafed_sites import Site, SiteRing
from oracles.small_federation import model
from ring_of_sites import (
    SITES,
    Threads,
    device,
    join,
    publish,
    site_settings,
    start_member,
    start_ring,
)
from service_harness import running_service, service_settings, until
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.run_records import RoundRow, find_run, list_rounds, list_runs
from wearfleet_edge.local_state import LocalState
from wearfleet_edge.state import StateDirectory
from wearfleet_protos.batching import rng_key
from wearfleet_protos.plan import PLAN_MEDIA_TYPE, Plan
from wearfleet_protos.tensors import Digest, decode_tensors

pytestmark = pytest.mark.slow

RATE, BATCH, PASSES = 0.05, 16, 1
LISTENING = {"threshold": 0.5, "personal_threshold": 0.1, "strength": 1.0}
SITE_OPTIONS = {"learning_rate": RATE, "batch_size": BATCH, "passes": PASSES, **LISTENING}
TOLERANCE = 2e-4
"""At most 5 turns of 4 steps of float32 whose sums over 16 x 40 terms are ordered differently, in two devices that are
averaged: 20 x sqrt(640) 2^-24 = 3e-5; a hop hands on what the one before it lost, and teachers double it."""


class RingUnderTest:
    """Services, devices and members, and what the ring's service recorded."""

    def __init__(self, folder: Path, stack: AsyncExitStack, threads: Threads) -> None:
        self.folder, self.stack, self.threads = folder, stack, threads
        self.names: dict[str, str] = {}

    async def start(self, **federation: float) -> None:
        self.settings = service_settings(
            self.folder / "relay", broker={"kind": "embedded"}, federation=federation
        )
        self.relay = await self.stack.enter_async_context(running_service(self.settings))
        for name, people in SITES.items():
            settings = site_settings(self.folder, name)
            service = await self.stack.enter_async_context(running_service(settings))
            await asyncio.to_thread(publish, settings)
            for person, windows in people.items():
                await asyncio.to_thread(
                    device, self.threads, self.folder / f"{name}-devices", service, person, windows
                )
            self.names[await asyncio.to_thread(join, self.folder, self.relay, name)] = name
            await self.member(name)

    async def member(self, name: str) -> None:
        settings = site_settings(self.folder, name)
        await asyncio.to_thread(start_member, self.threads, settings, name, SITE_OPTIONS)

    def kill(self, name: str) -> None:
        """End a site's process in the ring without a word; its service and its devices go on."""
        self.threads.members.pop(name).stop()

    def recorded(self, run_id: str) -> tuple[str, list[RoundRow]]:
        state = open_state(self.settings)
        try:
            with state.database.read() as connection:
                return find_run(connection, run_id).state, list_rounds(connection, run_id)
        finally:
            state.database.close()

    def invited(self, run_id: str, number: int) -> list[str]:
        """Who is asked in a round."""
        rows = [row for row in self.recorded(run_id)[1] if row.round == number]
        return [self.names[name] for row in rows for name in row.snapshot["invited"]]

    def turns(self, run_id: str) -> list[tuple[int, list[str]]]:
        """Number of each round that gave a model, and who made it."""
        rows = self.recorded(run_id)[1]
        return [
            (row.round, sorted(self.names[receipt["client"]] for receipt in row.snapshot["receipts"]))
            for row in rows
            if row.state == "published"
        ]

    def plan(self, run_id: str) -> Plan:
        state = open_state(self.settings)
        try:
            with state.database.read() as connection:
                document = state.blobs.read(Digest(find_run(connection, run_id).plan_digest))
            return Plan.from_bytes(state.keys.verify(document, PLAN_MEDIA_TYPE))
        finally:
            state.database.close()

    def kept(self, name: str, run_id: str) -> dict[str, np.ndarray]:
        """The model that a site keeps in the ring, and whether it was good enough."""
        local = LocalState(StateDirectory(self.folder / name / "ring"))
        return local.local_tensors(run_id, self.plan(run_id).local_specs())[0]

    def last_run(self, name: str) -> dict[str, np.ndarray]:
        """Global tensors of a site's last run."""
        state = open_state(site_settings(self.folder, name))
        try:
            with state.database.read() as connection:
                digest = list_runs(connection)[-1].tensors_digest
            return decode_tensors(state.blobs.read(Digest(digest)))
        finally:
            state.database.close()


def oracle() -> SiteRing:
    sites = {
        name: Site(model("cnn"), {person: parts["train"] for person, parts in people.items()})
        for name, people in SITES.items()
    }
    return SiteRing(
        sites,
        **LISTENING,
        share_norm=False,
        passes=PASSES,
        rate=RATE,
        batch=BATCH,
        seed=lambda number: rng_key(3, number, 0x51E, 0),
    )


def followed(turns: list[tuple[int, list[str]]], laps: int) -> tuple[SiteRing, dict[str, object]]:
    """The oracle takes the turns that were recorded; the models that sites keep before the last stage come with it."""
    ring, teacher, hops = oracle(), None, 0
    kept: dict[str, object] = {}
    for number, names in turns:
        personal = hops == laps * len(SITES)
        if personal:
            kept = {name: ({n: v.clone() for n, v in site.model.state_dict().items()}, site.good)
                    for name, site in ring.sites.items()}  # fmt: skip
        stage = 2 if personal else int(teacher is not None)
        made = [ring.turn(number, name, teacher, stage) for name in sorted(names)]
        if number > 1 and not personal:
            (teacher,), hops = made, hops + 1
    return ring, kept


def assert_near(ours: dict[str, np.ndarray], expected: dict, what: str) -> None:
    for name, value in expected.items():
        if "num_batches" in name or name.startswith("standardise"):
            continue
        error = np.linalg.norm(ours[name] - value.numpy()) / max(np.linalg.norm(value.numpy()), 1e-3)
        assert error < TOLERANCE, (what, name)


def holds(folder: Path, data: bytes) -> bool:
    """Whether these bytes lie anywhere in a folder."""
    return any(data in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("sealed", ["off", "on"])
async def test_three_sites_make_the_models_of_a_ring_of_federations_in_torch(
    tmp_path: Path, sealed: str
) -> None:
    threads = Threads()
    laps = 2
    async with AsyncExitStack() as stack:
        ring = RingUnderTest(tmp_path, stack, threads)
        stack.callback(threads.end)
        await ring.start()
        options = {"warm_rounds": 1, "laps": laps, "sealed": sealed, **LISTENING}
        run_id = await asyncio.to_thread(start_ring, ring.settings, options, 1 + laps * len(SITES))
        await until(lambda: ring.recorded(run_id)[0] != "running", 120.0)
        turns = ring.turns(run_id)
        order = sorted(SITES)
        assert turns == [(1, order), *((2 + i, [order[i % 3]]) for i in range(6)), (8, order)]
        plain, kept = followed(turns, laps)
        how = {what for _, _, what in plain.taught}
        assert how == {"alone", "took over", "distilled"}, "the test wants both ways of learning"
        for name in SITES:
            expected, good = kept[name]
            ours = ring.kept(name, run_id)
            assert bool(ours["good_enough"]) == good
            assert_near(ours, expected, name)
            assert_near(ring.last_run(name), plain.sites[name].model.state_dict(), f"{name}, last stage")
        last = ring.kept("south", run_id)["head.weight"].tobytes()
        assert holds(tmp_path / "south", last)
        assert holds(tmp_path / "relay", last) == (sealed == "off"), "what the relay has of the last hop"
        await asyncio.to_thread(threads.end)


async def test_a_site_killed_at_its_turn_is_passed_over_and_comes_back_at_its_place(tmp_path: Path) -> None:
    threads = Threads()
    laps = 2
    async with AsyncExitStack() as stack:
        ring = RingUnderTest(tmp_path, stack, threads)
        stack.callback(threads.end)
        await ring.start(gateway_lease_s=8.0)
        options = {"warm_rounds": 1, "laps": laps, **LISTENING}
        run_id = await asyncio.to_thread(start_ring, ring.settings, options, 1 + laps * len(SITES))
        await until(lambda: ring.invited(run_id, 3) == ["north"], 60.0)
        await asyncio.to_thread(ring.kill, "north")
        await until(lambda: len(ring.turns(run_id)) >= 4, 60.0)
        await ring.member("north")
        await until(lambda: ring.recorded(run_id)[0] != "running", 120.0)
        turns = ring.turns(run_id)
        assert [names for _, names in turns[:3]] == [["east", "north", "south"], ["east"], ["south"]]
        third = next(row for row in ring.recorded(run_id)[1] if row.round == 3)
        assert [ring.names[name] for name in third.snapshot["lost"]] == ["north"]
        hops = [names[0] for _, names in turns[1:-1]]
        assert len(hops) == laps * len(SITES)
        assert "north" in hops
        after = {"east": {"north", "south"}, "north": {"south"}, "south": {"east"}}  # north may be away
        assert all(following in after[name] for name, following in pairwise(hops)), hops
        assert turns[-1][1] == sorted(SITES)
        plain, kept = followed(turns, laps)
        for name in SITES:
            expected, good = kept[name]
            ours = ring.kept(name, run_id)
            assert bool(ours["good_enough"]) == good
            assert_near(ours, expected, name)
            assert_near(ring.last_run(name), plain.sites[name].model.state_dict(), f"{name}, last stage")
        await asyncio.to_thread(threads.end)


async def test_without_its_last_site_the_last_stage_has_the_last_completed_model_as_its_teacher(
    tmp_path: Path,
) -> None:
    threads = Threads()
    async with AsyncExitStack() as stack:
        ring = RingUnderTest(tmp_path, stack, threads)
        stack.callback(threads.end)
        await ring.start(gateway_lease_s=8.0)
        options = {"warm_rounds": 1, "laps": 1, **LISTENING}
        run_id = await asyncio.to_thread(start_ring, ring.settings, options, 1 + len(SITES), 20.0)
        await until(lambda: ring.invited(run_id, 4) == ["south"], 60.0)
        await asyncio.to_thread(ring.kill, "south")
        await until(lambda: ring.recorded(run_id)[0] != "running", 90.0)
        assert ring.recorded(run_id)[0] == "done"
        turns = ring.turns(run_id)
        assert [names for _, names in turns] == [
            sorted(SITES),
            ["east"],
            ["north"],
            ["east"],
            ["east", "north"],
        ]
        last = ring.kept("east", run_id)["head.weight"]
        for name in ("east", "north"):
            np.testing.assert_array_equal(ring.last_run(name)["teacher/head.weight"], last)
        await asyncio.to_thread(threads.end)
