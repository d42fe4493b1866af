"""Secure aggregation between real processes over mutual TLS: an agent, then the service, killed in the middle of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fleet_processes import PEOPLE, Fleet, Kit, make_kit, wait_for
from wearfleet_protos.tensors import decode_tensors

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.broker, pytest.mark.slow]

VICTIM = PEOPLE[3]
STREAM = ("--speed", "20", "--repeat", "--verbose")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """Devices train for a second or two, so that a test can act meanwhile."""
    return make_kit(tmp_path_factory.mktemp("slow-kit"), epochs=150)


@contextmanager
def secure_fleet(root: Path, kit: Kit, minimum: int = 3) -> Iterator[Fleet]:
    """A service with a model, and four agents that join secure cohorts of at least so many devices."""
    with Fleet(root, kit) as fleet:
        fleet.start_service()
        fleet.admin("models", "publish", str(kit.model))
        for name in PEOPLE:
            fleet.enrol(name)
            fleet.device(name).config.write_text(
                f"[federation]\nsecure_minimum_cohort = {minimum}\nsecure_only = true\n"
            )
            fleet.start_agent(name, *STREAM)
        yield fleet


def start_run(fleet: Fleet, *options: str, rounds: int = 3) -> str:
    run_id: str = fleet.admin(
        "federation", "start", "--plan", str(fleet.kit.plan), "--rounds", str(rounds), "--min-clients", "4",
        "--deadline", "60", "--set", "secagg=on", *options,
    )["run_id"]  # fmt: skip
    return run_id


def wait_for_keys(fleet: Fleet, run_id: str, number: int) -> None:
    """Every device has shared its keys in this round, and trains now: for a second, as the kit is made."""
    text = f"secureround{number}of{run_id}:mask"  # the log breaks its lines
    log = fleet.root / "logs" / "service.log"
    wait_for(
        f"keys are shared in round {number}",
        lambda: text in "".join(log.read_text().split()),
        every=0.005,
    )


def ended(fleet: Fleet, run_id: str) -> list[tuple[int, str, str]]:
    """Rounds of a run when it is over."""
    wait_for(
        "the run ends",
        lambda: fleet.rows("SELECT state FROM runs WHERE run_id = ?", run_id) != [("running",)],
        100,
    )
    assert fleet.rows("SELECT state, reason FROM runs WHERE run_id = ?", run_id) == [("done", "")]
    return fleet.rows("SELECT round, kind, state FROM rounds WHERE run_id = ? ORDER BY round", run_id)


def submitted(fleet: Fleet, number: int) -> set[str]:
    query = "SELECT device_id FROM submissions WHERE round = ?"
    by_device = {device: name for name, device in fleet.device_ids.items()}
    return {by_device[row[0]] for row in fleet.rows(query, number)}


def base_of(fleet: Fleet, number: int) -> str:
    return str(fleet.rows("SELECT base_digest FROM rounds WHERE round = ?", number)[0][0])


def tensors_of(fleet: Fleet, digest: str) -> dict[str, Any]:
    name = digest.removeprefix("sha256:")
    (path,) = [
        p
        for p in (fleet.cloud / "artifacts").rglob("*")
        if p.is_file() and name in p.as_posix().replace("/", "")
    ]
    return decode_tensors(path.read_bytes())


def assert_no_figures(fleet: Fleet) -> None:
    """What a device did and how well it fits is in no submission."""
    for row in fleet.rows("SELECT num_examples, num_steps, train_seconds, metrics FROM submissions"):
        assert row == (1, 0, 0.0, "{}")


def test_three_rounds_with_an_agent_killed_after_it_shared_its_keys(kit: Kit, tmp_path: Path) -> None:
    with secure_fleet(tmp_path, kit) as fleet:
        run_id = start_run(fleet)
        wait_for_keys(fleet, run_id, 2)
        fleet.kill(VICTIM)
        fleet.start_agent(VICTIM, *STREAM)
        rounds = ended(fleet, run_id)
        fleet.processes.stop(PEOPLE)
        assert rounds == [(n, "train", "published") for n in (1, 2, 3)] + [(4, "personalise", "published")]
        assert [submitted(fleet, number) for number in (1, 2, 3)] == [
            set(PEOPLE), set(PEOPLE) - {VICTIM}, set(PEOPLE),
        ]  # fmt: skip
        assert_no_figures(fleet)
        bases = [tensors_of(fleet, base_of(fleet, number)) for number in (1, 2, 3, 4)]
        for before, after in pairwise(bases):
            moved = [np.abs(after[name] - before[name]).max() for name in before]
            assert (
                0.0 < max(moved) < 1.0
            )  # an average that was not unmasked would be anything up to the clip, 1
            assert all(np.isfinite(array).all() for array in after.values())


def test_a_service_killed_in_the_middle_skips_the_round_and_keeps_the_old_model(
    kit: Kit, tmp_path: Path
) -> None:
    with secure_fleet(tmp_path, kit) as fleet:
        run_id = start_run(fleet)
        wait_for_keys(fleet, run_id, 2)
        fleet.kill("service")
        fleet.start_service()
        rounds = ended(fleet, run_id)
        fleet.processes.stop(PEOPLE)
        states = ["published", "skipped", "published", "published"]
        assert [state for _, _, state in rounds] == states
        assert base_of(fleet, 3) == base_of(fleet, 2)
        assert base_of(fleet, 4) != base_of(fleet, 3)
        assert submitted(fleet, 3) == set(PEOPLE)


def test_devices_that_ask_for_more_members_decline_and_nothing_is_sent(kit: Kit, tmp_path: Path) -> None:
    with secure_fleet(tmp_path, kit, minimum=10) as fleet:
        run_id = start_run(fleet, rounds=1)
        rounds = ended(fleet, run_id)
        assert rounds[0] == (1, "train", "skipped")
        assert submitted(fleet, 1) == set()
        for name in PEOPLE:
            wait_for(
                f"{name} says that it declined", lambda name=name: fleet.status(name)["federated_declined"]
            )
