"""Coded down-links among agents and a service, each a process: killed or not, all train from the same tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fleet_processes import PEOPLE, Fleet, make_kit, wait_for
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_protos.tensors import digest_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.broker]

ROUNDS = 8
SPEED = ("--speed", "20", "--repeat")


@pytest.mark.parametrize("downlink", ["difference", "int8"])
def test_an_agent_and_the_service_killed_in_mid_run_go_on_with_differences(
    tmp_path: Path, downlink: str
) -> None:
    kit = make_kit(tmp_path, epochs=2, strategy="fedavg", downlink=downlink)
    with Fleet(tmp_path / "fleet", kit) as fleet:
        fleet.start_service()
        fleet.admin("models", "publish", str(kit.model))
        for name in PEOPLE:
            fleet.enrol(name)
            fleet.start_agent(name, *SPEED)
        run_id = fleet.admin(
            "federation", "start", "--plan", str(kit.plan), "--rounds", str(ROUNDS),
            "--min-clients", "4", "--quorum", "4", "--deadline", "120", "--set", f"downlink={downlink}",
        )["run_id"]  # fmt: skip

        def published() -> int:
            return len(fleet.rows("SELECT round FROM rounds WHERE state = 'published' AND kind = 'train'"))

        wait_for("two rounds", lambda: published() >= 2)
        fleet.kill("anna")
        fleet.start_agent("anna", *SPEED)
        wait_for("four rounds", lambda: published() >= 4)
        fleet.kill("service")
        fleet.start_service()
        wait_for(
            "the run ends",
            lambda: fleet.rows("SELECT state FROM runs WHERE run_id = ?", run_id) != [("running",)],
            90,
        )
        assert fleet.rows("SELECT state, reason FROM runs") == [("done", "")]
        for name in PEOPLE:
            wait_for(f"{name} has personal weights", lambda name=name: fleet.status(name).get("personalised"))
        fleet.processes.stop(PEOPLE)
        fleet.processes.stop(["service"])
        check(fleet, downlink)


def check(fleet: Fleet, downlink: str) -> None:
    rows = fleet.rows("SELECT kind, state, base_digest, bytes_down FROM rounds ORDER BY round")
    assert [row[:2] for row in rows] == [*[("train", "published")] * ROUNDS, ("personalise", "published")]
    whole = Blobs(fleet.cloud / "artifacts").size(rows[0][2])
    assert rows[0][3] > 4 * whole, "plan and graphs come once too"
    share = 0.9 if downlink == "difference" else 0.6
    small = [bytes_down < share * 4 * whole for *_, bytes_down in rows[1:]]
    # a killed agent asks again in its round, and the service writes the bytes of a round with its next change
    assert sum(small) >= ROUNDS - 2
    for name in PEOPLE:
        (held,) = (fleet.device(name).federated / "held" / "versions").iterdir()
        assert digest_of(held.read_bytes()) == rows[-1][2], "all hold the last tensors, to the bit"
        assert fleet.status(name)["federated_declined"] == 0
