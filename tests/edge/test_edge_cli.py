"""The command line: starts fast, says everything as JSON, ends with the promised codes."""

import json
import subprocess
import sys
import time

import pytest
from edge.simulators import Authority, GrpcService, Signer, SimulatedCloud, serve
from ports import free_port
from typer.testing import CliRunner
from wearfleet_edge import process
from wearfleet_edge.cli import app, main
from wearfleet_edge.doctor import examine
from wearfleet_edge.enrolment import enrol_device
from wearfleet_edge.outbox import Outbox
from wearfleet_edge.state import StateDirectory, write_json
from wearfleet_protos.errors import NotFoundError
from wearfleet_protos.ticket import EnrolmentTicket


def _json(*arguments):
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    return result.exit_code, json.loads(result.stdout)


HELP = """
import sys
from typer.testing import CliRunner
before = set(sys.modules)
from wearfleet_edge.cli import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""


def test_the_help_imports_nothing_that_is_slow_to_import():
    """What keeps the start below 0.3 s; ``bench_edge.py`` measures it."""
    found = subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "['typer', 'wearfleet_edge']"


def test_help_names_every_command():
    text = CliRunner().invoke(app, ["--help"]).stdout
    for command in ("enrol", "run", "replay", "status", "outbox", "doctor"):
        assert command in text


def test_status_shows_what_the_agent_wrote(tmp_path):
    with pytest.raises(NotFoundError, match="has not run"):
        _json("status", "--state", str(tmp_path))
    write_json(tmp_path / "status.json", {"device": "anna-1f3a", "windows_sent": 3})
    assert _json("status", "--state", str(tmp_path)) == (0, {"device": "anna-1f3a", "windows_sent": 3})


def test_outbox_shows_what_waits(tmp_path):
    outbox = Outbox(
        tmp_path / "outbox.sqlite", boot="00000001", clock_ns=time.time_ns, max_messages=2, max_bytes=1000
    )
    for _ in range(3):
        outbox.append([("tele/health", lambda _: b"12345")])
    code, facts = _json("outbox", "--state", str(tmp_path))
    assert code == 0
    assert facts["depth"] == 2
    assert facts["size_bytes"] == 10
    assert facts["lost"] == {"tele/health": 1}
    assert facts["oldest_age_s"] >= 0


def test_an_error_is_one_line_with_its_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wearfleet-edge", "status", "--state", str(tmp_path), "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == "NotFoundError"
    assert len(err.splitlines()) == 1


def test_run_becomes_the_agent_with_its_options(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "os.execve", lambda path, command, environment: seen.append((path, command, environment))
    )
    CliRunner().invoke(
        app, ["run", "--state", str(tmp_path), "--recording", "a.npz", "--speed", "5", "--repeat"]
    )
    ((path, command, environment),) = seen
    arguments = json.loads(command[-1])
    assert path == sys.executable
    assert command[1:3] == ["-m", "wearfleet_edge.process"]
    assert arguments["speed"] == 5.0
    assert arguments["repeat"] is True
    assert arguments["once"] is False
    assert arguments["share_raw_windows"] is None
    assert environment["OPENBLAS_NUM_THREADS"] == "1"
    assert process.ProcessArguments(**arguments).to_json() == command[-1]


def test_doctor_finds_nothing_in_an_empty_place_and_says_what_to_do(tmp_path):
    code, facts = _json("doctor", "--state", str(tmp_path / "new"))
    checks = {c["name"]: c for c in facts["checks"]}
    assert code == 1
    assert checks["onnx runtime"]["ok"]
    assert not checks["identity"]["ok"]
    assert "wearfleet-edge enrol" in checks["identity"]["detail"]


def test_doctor_checks_an_enrolled_device(tmp_path):
    service = GrpcService(SimulatedCloud(), Authority(), Signer(), free_port())
    state = StateDirectory(tmp_path / "device")
    with serve(service, require_certificate=False):
        enrol_device(state, EnrolmentTicket(service.address, "right-code", service.authority.der).encode())
        checks = {c.name: c for c in examine(state)}
        assert checks["identity"].ok
        assert checks["certificate"].ok
        assert checks["cloud"].ok
        assert service.cloud.reported[-1].agent_version != ""
        assert "anna-1f3a" in checks["identity"].detail
        assert not checks["broker"].ok
        assert "no broker answers" in checks["broker"].detail
        state.key.chmod(0o644)
        state.config.write_text("nonsense = 1")
        checks = {c.name: c for c in examine(state)}
        assert "chmod 600" in checks["identity"].detail
        assert "unknown key nonsense" in checks["settings"].detail
    assert "UNAVAILABLE" in {c.name: c for c in examine(state)}["cloud"].detail
