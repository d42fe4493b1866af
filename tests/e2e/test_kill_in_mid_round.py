"""``kill -9`` of an agent and of the service in mid-round: all goes on, nothing is lost or counted twice."""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from fleet_processes import PEOPLE, Fleet, Kit, wait_for
from wearfleet_edge.outbox import inspect_outbox
from wearfleet_protos.tensors import decode_tensors, tensor_metadata

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.broker]

ROUNDS = 3
VICTIM = PEOPLE[3]
STREAM = ("--speed", "20", "--repeat", "--share-raw-windows", "--verbose")


def submitted(fleet: Fleet, number: int) -> list[str]:
    return [row[0] for row in fleet.rows("SELECT device_id FROM submissions WHERE round = ?", number)]


def stop_in_mid_round(fleet: Fleet) -> int:
    """Freeze one agent as soon as its first update is in; the next round then waits for it alone. Its number."""
    victim = fleet.device_ids[VICTIM]
    wait_for("the first update of the agent that will be killed", lambda: victim in submitted(fleet, 1))
    os.kill(fleet.pids[VICTIM], signal.SIGSTOP)
    wait_for("all other agents hand in their second update", lambda: len(submitted(fleet, 2)) >= 3)
    return 2


def test_a_round_outlives_the_kill_of_an_agent_and_of_the_service(kit: Kit, tmp_path: Path) -> None:
    with Fleet(tmp_path, kit) as fleet:
        first = fleet.start_service()
        fleet.admin("models", "publish", str(kit.model))
        for name in PEOPLE:
            fleet.enrol(name)
            fleet.start_agent(name, *STREAM)
        run_id = fleet.admin(
            "federation", "start", "--plan", str(kit.plan), "--rounds", str(ROUNDS),
            "--min-clients", "4", "--quorum", "4", "--deadline", "120",
        )["run_id"]  # fmt: skip

        number = stop_in_mid_round(fleet)
        states = dict(fleet.rows("SELECT round, state FROM rounds"))
        assert states == {1: "published", number: "running"}
        assert sorted(submitted(fleet, number)) == sorted(fleet.device_ids[name] for name in PEOPLE[:3])
        fleet.kill(VICTIM)
        fleet.kill("service")
        again = fleet.start_service()
        fleet.start_agent(VICTIM, *STREAM)
        assert {**again, "pid": 0} == {**first, "pid": 0}
        assert again["pid"] != first["pid"]

        wait_for(
            "the run ends",
            lambda: fleet.rows("SELECT state FROM runs WHERE run_id = ?", run_id) != [("running",)],
        )
        assert fleet.rows("SELECT state, reason FROM runs") == [("done", "")]
        for name in PEOPLE:
            wait_for(f"{name} has personal weights", lambda name=name: fleet.status(name).get("personalised"))
        fleet.processes.stop(PEOPLE)
        wait_for(
            "everything is stored",
            lambda: all(stored(fleet, name) == appended(fleet, name) for name in PEOPLE),
        )
        fleet.processes.stop(["service"])

        assert_every_device_counts_once_in_every_round(fleet)
        for name in PEOPLE:
            assert_no_window_is_lost_or_counted_twice(fleet, name)
            assert_personal_weights_of_the_run(fleet, name, run_id)
        assert restarts(fleet) == {name: 2 if name == VICTIM else 1 for name in PEOPLE}


def assert_every_device_counts_once_in_every_round(fleet: Fleet) -> None:
    rounds = fleet.rows("SELECT round, kind, state FROM rounds ORDER BY round")
    kinds = [*["train"] * ROUNDS, "personalise"]
    assert rounds == [(number, kind, "published") for number, kind in enumerate(kinds, start=1)]
    counted = Counter(fleet.rows("SELECT round, device_id FROM submissions"))
    assert counted == {(row[0], device): 1 for row in rounds for device in fleet.device_ids.values()}


def appended(fleet: Fleet, name: str) -> dict[str, int]:
    """Messages of each kind that a device has ever written to its outbox."""
    found = inspect_outbox(fleet.device(name).outbox).appended
    return {"prediction": found["tele/prediction"], "window": found["tele/window"]}


def stored(fleet: Fleet, name: str) -> dict[str, int]:
    """Rows of each kind that the service has of a device."""
    count = "SELECT COUNT(*) FROM {} JOIN streams USING (stream_id) WHERE device_id = ?"
    device = fleet.device_ids[name]
    return {kind: fleet.rows(count.format(f"{kind}s"), device)[0][0] for kind in ("prediction", "window")}


def assert_no_window_is_lost_or_counted_twice(fleet: Fleet, name: str) -> None:
    outbox = inspect_outbox(fleet.device(name).outbox)
    assert outbox.depth == 0
    assert outbox.lost == {}
    assert min(appended(fleet, name).values()) > 20
    assert stored(fleet, name) == appended(fleet, name)
    for kind in ("prediction", "window"):
        numbers: dict[str, list[int]] = {}
        query = f"SELECT boot_id, sequence FROM {kind}s JOIN streams USING (stream_id) WHERE device_id = ?"
        for boot, sequence in fleet.rows(query, fleet.device_ids[name]):
            numbers.setdefault(boot, []).append(sequence)
        for sequences in numbers.values():
            assert sorted(sequences) == list(range(len(sequences)))


def restarts(fleet: Fleet) -> dict[str, int]:
    """Starts of each agent that the service has heard of."""
    query = "SELECT COUNT(DISTINCT boot_id) FROM streams WHERE device_id = ?"
    return {name: fleet.rows(query, device)[0][0] for name, device in fleet.device_ids.items()}


def assert_personal_weights_of_the_run(fleet: Fleet, name: str, run_id: str) -> None:
    data = fleet.device(name).personal.read_bytes()
    metadata = tensor_metadata(data)
    assert (metadata["run_id"], metadata["round"]) == (run_id, str(ROUNDS + 1))
    assert "head.weight" in decode_tensors(data)
    assert fleet.status(name)["federated_declined"] == 0
