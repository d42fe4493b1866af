"""An agent killed at each stage of a round, with clocks that are wrong and jump: it counts once in every round."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from fleet_processes import PEOPLE, Fleet, Kit, wait_for
from mortal_programs import deaths, write_program

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.broker]

STAGES = ("fetched", "training", "uploading", "submitted")
ROUNDS = 2
TEN_MINUTES = 600.0


def begin(fleet: Fleet, programs: dict[str, str]) -> None:
    """Two agents and a run that needs both of them in every round."""
    fleet.start_service()
    fleet.admin("models", "publish", str(fleet.kit.model))
    for name, program in programs.items():
        fleet.enrol(name)
        start_agent(fleet, name, program)
    fleet.admin(
        "federation", "start", "--plan", str(fleet.kit.plan), "--rounds", str(ROUNDS), "--min-clients", "2",
        "--quorum", "2", "--deadline", "120", "--no-personalise",
    )  # fmt: skip


def start_agent(fleet: Fleet, name: str, program: str) -> None:
    fleet.edge, usual = program, fleet.edge
    fleet.start_agent(name, "--speed", "20", "--repeat", "--verbose")
    fleet.edge = usual


def until_done(fleet: Fleet, name: str, again, deaths_due: int) -> None:
    """Start a process again whenever it has died, until the run has ended and it has died so often."""
    died, limit = 0, time.monotonic() + 200
    while (state := fleet.rows("SELECT state, reason FROM runs")) == [("running", "")] or died < deaths_due:
        assert time.monotonic() < limit, f"the run is {state}; {name} died {died} times"
        if fleet.processes.ended(name):
            died += 1
            fleet.processes.stop([name])
            again()
        time.sleep(0.05)
    assert state == [("done", "")]
    assert died == deaths_due


def assert_every_device_counted_once_in_every_round(fleet: Fleet) -> None:
    rounds = fleet.rows("SELECT round, state FROM rounds ORDER BY round")
    assert rounds == [(number, "published") for number in range(1, ROUNDS + 1)]
    counted = Counter(fleet.rows("SELECT round, device_id FROM submissions"))
    assert counted == {(r, device): 1 for r, _ in rounds for device in fleet.device_ids.values()}


def test_an_agent_killed_at_each_stage_counts_once_in_every_round_whatever_its_clock_says(
    kit: Kit, tmp_path: Path
) -> None:
    victim = write_program(tmp_path / "victim", "edge", STAGES, skew=TEN_MINUTES)
    other = write_program(
        tmp_path / "other", "edge", skew=-TEN_MINUTES
    )  # jumps from ten minutes behind to ten before
    with Fleet(tmp_path, kit) as fleet:
        begin(fleet, {PEOPLE[0]: victim, PEOPLE[1]: other})
        until_done(fleet, PEOPLE[0], lambda: start_agent(fleet, PEOPLE[0], victim), len(STAGES))
        assert deaths(victim) == sorted(STAGES)
        assert_every_device_counted_once_in_every_round(fleet)
        for name in PEOPLE[:2]:
            wait_for(f"{name} says that it declined nothing", lambda name=name: fleet.status(name))
            assert fleet.status(name)["federated_declined"] == 0
