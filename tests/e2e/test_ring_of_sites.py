"""Three hospitals in a sealed ring, all parts processes: a relay; a service, a ring process and two agents a site."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fleet_processes import Fleet, Kit, make_kit, wait_for
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_protos.tensors import decode_tensors

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e

SITES = {"east": ("anna", "ben"), "north": ("chloe", "dmitri"), "south": ("ben", "chloe")}
PASSES = 2


class SiteFleet(Fleet):
    """A site: its service, its agents, and its process in the ring."""

    def join(self, relay: Fleet, name: str) -> None:
        """Enrol the site in the ring."""
        ticket = relay.admin("devices", "enrol-code", "--name", name)["ticket"]
        self.ring_id = self.processes.call(
            "ring-join", ["wearfleet-cloud", "ring", "join", ticket, "--state", str(self.cloud), "--json"]
        )["device_id"]

    def start_ring(self) -> None:
        """Take turns."""
        command = [
            "wearfleet-cloud", "ring", "run", "--state", str(self.cloud), "--plan", str(self.kit.plan),
            "--min-clients", "2", "--quorum", "2", "--deadline", "60", "--set", f"passes={PASSES}", "--json",
        ]  # fmt: skip
        self.pids["ring"] = self.processes.start("ring", command).pid
        self.processes.ready_line("ring")

    def runs(self) -> list[tuple[Any, ...]]:
        """Runs of the site, oldest first: state, start tensors of round 1, newest tensors."""
        return self.rows(
            "SELECT runs.state, rounds.base_digest, runs.tensors_digest FROM runs "
            "JOIN rounds ON rounds.run_id = runs.run_id AND rounds.round = 1 ORDER BY runs.created_ns"
        )

    def tensors(self, digest: str) -> dict[str, np.ndarray]:
        """An artifact of the site."""
        return decode_tensors(Blobs(self.cloud / "artifacts").read(digest))  # type: ignore[arg-type]


def test_three_hospitals_learn_from_each_other_and_a_killed_site_goes_on_with_its_turn(
    tmp_path: Path,
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "ring").mkdir()
    kit = make_kit(tmp_path / "site", epochs=2, strategy="metafed-site", passes=PASSES)
    ring = make_kit(tmp_path / "ring", epochs=2, strategy="metafed", warm_rounds=1, laps=1, sealed="on")
    sites = {name: SiteFleet(tmp_path / name, kit) for name in SITES}
    with Fleet(tmp_path / "relay", Kit(kit.model, ring.plan, {})) as relay:
        try:
            begin(relay, sites)
            follow(relay, sites)
        finally:
            for site in sites.values():
                site.__exit__()


def personalised(site: SiteFleet, person: str) -> bool:
    return bool(site.status(person)["personalised"])


def begin(relay: Fleet, sites: dict[str, SiteFleet]) -> None:
    """Start everything, and the ring's run."""
    relay.start_service("--broker-kind", "embedded")
    relay.admin("models", "publish", str(relay.kit.model))
    for name, site in sites.items():
        site.start_service("--broker-kind", "embedded")
        site.admin("models", "publish", str(site.kit.model))
        for person in SITES[name]:
            site.enrol(person)
            site.start_agent(person, "--speed", "20", "--repeat")
        site.join(relay, name)
        site.start_ring()
    relay.admin(
        "federation", "start", "--plan", str(relay.kit.plan), "--rounds", "4", "--min-clients", "3",
        "--deadline", "120", "--set", "warm_rounds=1", "--set", "laps=1", "--set", "sealed=on",
    )  # fmt: skip


def follow(relay: Fleet, sites: dict[str, SiteFleet]) -> None:
    """Kill the second site's process in its turn, start it again, and look at what came of the run."""
    wait_for("north has begun its turn", lambda: len(sites["north"].runs()) == 2)
    sites["north"].kill("ring")
    sites["north"].start_ring()
    wait_for("the ring ends", lambda: relay.rows("SELECT state FROM runs") != [("running",)], 120)
    assert relay.rows("SELECT state, reason FROM runs") == [("done", "")]
    rounds = relay.rows("SELECT kind, state, snapshot FROM rounds ORDER BY round")
    assert [row[:2] for row in rounds] == [*[("train", "published")] * 4, ("personalise", "published")]
    invited = [set(json.loads(snapshot)["invited"]) for *_, snapshot in rounds]
    everyone = {site.ring_id for site in sites.values()}
    assert invited == [everyone, *({sites[name].ring_id} for name in sorted(sites)), everyone]
    teacher = None
    for name in sorted(sites):
        runs = sites[name].runs()
        assert [run[0] for run in runs] == ["done"] * 3, "warm-up, turn, last stage: one run each"
        start, made = (sites[name].tensors(digest) for digest in runs[1][1:])
        if teacher is not None:
            np.testing.assert_array_equal(start["teacher/head.weight"], teacher["head.weight"])
        teacher = made
    assert teacher is not None
    for name, site in sites.items():
        last = site.tensors(site.runs()[2][1])
        np.testing.assert_array_equal(last["teacher/head.weight"], teacher["head.weight"])
        for person in SITES[name]:
            wait_for(f"{person} of {name} has the site's model", partial(personalised, site, person))
            assert site.status(person)["federated_declined"] == 0
