"""The commands around a service's state folder: what they print, and how they fail."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import sqlalchemy as sa
import typer
from service_harness import GRAPH, begin_run, echo_plan, service_settings
from small_model_file import SHAPES_OF_A_MODEL, named_model
from typer.testing import CliRunner
from wearfleet_cloud.cli import serve
from wearfleet_cloud.export import write_release
from wearfleet_cloud.federated.plan_files import save_plan
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.device_records import Device, insert_device
from wearfleet_cloud.storage.tables import audit
from wearfleet_cloud.storage.telemetry_records import TelemetryBatch, TelemetryStore
from wearfleet_protos.errors import ConfigError, NotFoundError
from wearfleet_protos.tensors import digest_of
from wearfleet_protos.ticket import EnrolmentTicket


@pytest.fixture
def command(tmp_path):
    """Runs a command on a state folder and gives what it printed as JSON."""
    app = typer.Typer()
    serve.register(app)

    def run(*words: str, code: int = 0) -> object:
        result = CliRunner().invoke(app, [*words, "--state", str(tmp_path), "--json"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    return run


@pytest.fixture
def state(tmp_path):
    opened = open_state(service_settings(tmp_path))
    yield opened
    opened.database.close()


def test_a_ticket_carries_address_code_and_authority(command, state):
    printed = command("devices", "enrol-code", "--name", "anna", "--address", "fleet.example:7444")
    ticket = EnrolmentTicket.decode(printed["ticket"])
    assert ticket.cloud_address == "fleet.example:7444"
    assert ticket.ca_der == state.authority.ca_der


def test_devices_are_listed_with_what_came_of_their_windows(command, state):
    with state.database.write() as connection:
        insert_device(connection, Device("anna-0001", "default", "anna", None, 1, "ff", 2, "1", 3))
    batch = TelemetryBatch()
    row = {"received_ns": 1, "sample_index": 0, "wall_time_ns": 1, "payload": b"x"}
    batch.rows["window"] = [
        (("anna-0001", "00112233", "window"), row | {"sequence": n}) for n in (0, 1, 1, 3)
    ]
    TelemetryStore(state.database).store(batch)
    (listed,) = command("devices", "list")
    assert listed["windows"] == {"received": 3, "lost": 1, "duplicated": 1}
    assert command("devices", "show", "anna-0001")["streams"][0]["highest_sequence"] == 3
    assert command("devices", "revoke", "anna-0001")["revoked_ns"] > 0
    with pytest.raises(NotFoundError, match="devices list"):
        command("devices", "revoke", "eve-0002")


def test_a_device_is_put_in_quarantine_with_a_reason_and_released(command, state):
    with state.database.write() as connection:
        insert_device(connection, Device("anna-0001", "default", "anna", None, 1, "ff", 2, "1", 3))
    with pytest.raises(ConfigError, match="--reason"):
        command("devices", "quarantine", "anna-0001")
    put = command("devices", "quarantine", "anna-0001", "--reason", "sold second-hand")
    assert (put["quarantined_ns"] > 0, put["quarantine_reason"]) == (True, "sold second-hand")
    assert command("devices", "show", "anna-0001")["quarantine_reason"] == "sold second-hand"
    released = command("devices", "release", "anna-0001")
    assert (released["quarantined_ns"], released["quarantine_reason"]) == (None, "")
    with state.database.read() as connection:
        entries = connection.execute(sa.select(audit).order_by(audit.c.entry)).mappings()
        assert [(e["action"], e["detail"]) for e in entries if e["action"].startswith("device.")] == [
            ("device.quarantine", "sold second-hand"),
            ("device.release", ""),
        ]
    for verb in ("quarantine", "release"):
        with pytest.raises(NotFoundError, match="devices list"):
            command("devices", verb, "eve-0002")


def test_a_model_is_published_listed_and_shown(command, tmp_path):
    data, manifest = named_model(4)
    write_release(tmp_path / "model.onnx", data, manifest)
    assert command("models", "publish", str(tmp_path / "model.onnx"))["version"] == 4
    assert [(row["model_id"], row["released"]) for row in command("models", "list")] == [("har", True)]
    assert command("models", "show", "har")["labels"] == ["walk", "rest"]
    with pytest.raises(NotFoundError, match="does not exist"):
        command("models", "publish", str(tmp_path / "none.onnx"))
    with pytest.raises(NotFoundError):
        command("models", "show", "nothing")


def test_a_run_is_started_from_a_plan_and_the_released_model_watched_and_stopped(command, state, tmp_path):
    save_plan(tmp_path / "plan", echo_plan(SHAPES_OF_A_MODEL), {digest_of(GRAPH): GRAPH})
    start = ("federation", "start", "--plan", str(tmp_path / "plan"), "--rounds", "3", "--min-clients", "2")
    with pytest.raises(NotFoundError, match="no model is released"):
        command(*start)
    data, manifest = named_model(1)
    state.registry.publish(data, manifest, time.time_ns())
    run_id = command(*start)["run_id"]
    status = command("federation", "status", run_id)
    assert (status["state"], status["strategy"], status["rounds"]) == ("running", "fedavg", [])
    assert status["settings"]["cohort"]["min_connected"] == 2
    assert command("federation", "stop", run_id)["stopped"] is True
    assert command("federation", "stop", run_id)["stopped"] is False
    assert [run["state"] for run in command("federation", "status")] == ["stopped"]
    with pytest.raises(ConfigError, match="--run"):
        command("federation", "start")
    with pytest.raises(NotFoundError, match="federation status"):
        command("federation", "stop", "nothing")


def test_the_doctor_finds_a_healthy_state_and_a_broken_audit_log(command, state, tmp_path):
    begin_run(service_settings(tmp_path), {"a": (2,)}, rounds=1, min_clients=1)
    assert {finding["check"]: finding["ok"] for finding in command("doctor")}["audit log"]
    with state.database.write() as connection:
        connection.exec_driver_sql("update audit set detail = 'other'")
    findings = {finding["check"]: finding for finding in command("doctor", code=1)}
    assert "entry 0 was changed" in findings["audit log"]["detail"]


def test_the_start_values_of_a_run_are_those_of_the_released_model(command, state, tmp_path):
    save_plan(tmp_path / "plan", echo_plan(SHAPES_OF_A_MODEL), {digest_of(GRAPH): GRAPH})
    data, manifest = named_model(1)
    state.registry.publish(data, manifest, time.time_ns())
    command("federation", "start", "--plan", str(tmp_path / "plan"))
    (run,) = command("federation", "status")
    from wearfleet_protos.tensors import decode_tensors

    tensors = decode_tensors(state.blobs.read(run["tensors_digest"]))
    np.testing.assert_array_equal(tensors["scale"], np.array([1.0, 2.0], np.float32))
