"""FedAP among four agents and a service, each a process, over mutual TLS: everyone gets a model of its own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fleet_processes import PEOPLE, Fleet, make_kit, wait_for
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.client_models import ClientModels, mixed
from wearfleet_cloud.federated.mixtures import MixtureStrategy
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_protos.tensors import decode_tensors, tensor_metadata

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.broker]

ROUNDS = 3
OPTIONS = {"warmup_rounds": 1, "own_weight": 0.4}


def test_four_agents_and_a_service_make_four_mixtures(tmp_path: Path) -> None:
    kit = make_kit(tmp_path, epochs=2, strategy="fedap", **OPTIONS)
    with Fleet(tmp_path / "fleet", kit) as fleet:
        fleet.start_service()
        fleet.admin("models", "publish", str(kit.model))
        for name in PEOPLE:
            fleet.enrol(name)
            fleet.start_agent(name, "--speed", "20", "--repeat")
        settings = [word for name, value in OPTIONS.items() for word in ("--set", f"{name}={value}")]
        run_id = fleet.admin(
            "federation", "start", "--plan", str(kit.plan), "--rounds", str(ROUNDS),
            "--min-clients", "4", "--quorum", "4", "--deadline", "120", *settings,
        )["run_id"]  # fmt: skip
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
        check_everyone_has_its_own(fleet, run_id)


def check_everyone_has_its_own(fleet: Fleet, run_id: str) -> None:
    rows = fleet.rows("SELECT round, kind, state, snapshot FROM rounds ORDER BY round")
    kinds = [*["train"] * ROUNDS, "personalise"]
    assert [row[:3] for row in rows] == [(n, kind, "published") for n, kind in enumerate(kinds, start=1)]
    blobs = Blobs(fleet.cloud / "artifacts")
    last = json.loads(rows[-1][3])
    state = decode_tensors(blobs.read(last["base_state"]))
    current = decode_tensors(blobs.read(last["base"]))
    models = ClientModels.from_state(state)
    assert models.clients == tuple(sorted(fleet.device_ids.values()))
    assert (models.aggregations, models.seen.tolist()) == (ROUNDS, [ROUNDS] * 4)
    strategy = create_strategy("fedap", OPTIONS)
    assert isinstance(strategy, MixtureStrategy)
    weights = strategy.weights(models)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.diag(weights), 0.4, rtol=1e-12)
    for name, array in mixed(weights, models.last).items():
        np.testing.assert_array_equal(models.own[name], array)
    for name, device in fleet.device_ids.items():
        received = strategy.received(device, current, state)
        data = fleet.device(name).personal.read_bytes()
        assert tensor_metadata(data)["run_id"] == run_id
        personal = decode_tensors(data)
        distances = {
            client: sum(float(np.sum((personal[t] - rows[r]) ** 2)) for t, rows in models.own.items())
            for r, client in enumerate(models.clients)
        }
        assert min(distances, key=lambda client: distances[client]) == device, "it began with another's model"
        assert not np.array_equal(received["head.weight"], current["head.weight"])
        assert fleet.status(name)["federated_declined"] == 0
