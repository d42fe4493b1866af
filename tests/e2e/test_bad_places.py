"""Agents and a service, each a process, where the link of one agent is slow or the service's disk is too small."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from bad_places import SmallDisk, slow_link_in_a_thread
from fleet_processes import PEOPLE, Fleet, Kit, wait_for
from wearfleet_edge.state import read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.broker]

RATE = 20_000.0
"""Bytes a second of the slow link."""


def begin(fleet: Fleet, rounds: int, deadline_s: int) -> None:
    """A run that needs both agents in every round."""
    fleet.admin(
        "federation", "start", "--plan", str(fleet.kit.plan), "--rounds", str(rounds), "--min-clients", "2",
        "--quorum", "2", "--deadline", str(deadline_s), "--no-personalise",
    )  # fmt: skip


def rounds_of(fleet: Fleet) -> list[str]:
    return [state for (state,) in fleet.rows("SELECT state FROM rounds ORDER BY round")]


def until_done(fleet: Fleet) -> None:
    wait_for(
        "the run ends",
        lambda: fleet.rows("SELECT state, reason FROM runs") not in ([], [("running", "")]),
        120,
    )
    assert fleet.rows("SELECT state, reason FROM runs") == [("done", "")]


def test_an_agent_on_a_slow_link_counts_in_every_round(kit: Kit, tmp_path: Path) -> None:
    with Fleet(tmp_path, kit) as fleet:
        fleet.start_service()
        fleet.admin("models", "publish", str(kit.model))
        for name in PEOPLE[:2]:
            fleet.enrol(name)
        slow = fleet.device(PEOPLE[0])
        enrolment = read_json(slow.enrolment)
        with slow_link_in_a_thread(enrolment["cloud_address"], RATE) as address:
            write_json(slow.enrolment, enrolment | {"cloud_address": address})
            for name in PEOPLE[:2]:
                fleet.start_agent(name)
            begin(fleet, rounds=2, deadline_s=100)
            until_done(fleet)
            fleet.processes.stop(PEOPLE[:2])
        assert rounds_of(fleet) == ["published"] * 2
        counted = Counter(fleet.rows("SELECT round, device_id FROM submissions"))
        assert counted == {(r, device): 1 for r in (1, 2) for device in fleet.device_ids.values()}
        size = fleet.rows("SELECT bytes_down, bytes_up, closed_ns - opened_ns FROM rounds ORDER BY round")
        for down, up, nanoseconds in size:  # half of the bytes are the slow one's, one way after the other
            assert nanoseconds * 1e-9 > (down + up) / 2 / RATE


def test_a_disk_that_is_full_skips_a_round_and_the_next_one_counts_when_there_is_room(
    kit: Kit, tmp_path: Path
) -> None:
    disk = SmallDisk(tmp_path / "cloud" / "updates", 16)  # an update of this model has 40 kB
    try:
        with Fleet(tmp_path, kit) as fleet:
            fleet.start_service()
            fleet.admin("models", "publish", str(kit.model))
            for name in PEOPLE[:2]:
                fleet.enrol(name)
                fleet.start_agent(name)
            begin(fleet, rounds=2, deadline_s=25)
            wait_for("the second round has begun", lambda: len(rounds_of(fleet)) == 2)
            assert rounds_of(fleet)[0] == "skipped"
            disk.enlarge(8000)
            until_done(fleet)
            assert rounds_of(fleet) == ["skipped", "published"]
            bases = fleet.rows("SELECT base_digest FROM rounds ORDER BY round")
            assert bases[0] == bases[1], "the old model is kept"
            counted = Counter(fleet.rows("SELECT round, device_id FROM submissions"))
            assert counted == {(2, device): 1 for device in fleet.device_ids.values()}
            fleet.processes.stop([*PEOPLE[:2], "service"])
    finally:
        disk.close()
