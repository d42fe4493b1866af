"""Bad input at the command line: one clear line, the promised exit code, and everything else as it was."""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fleet_processes import PEOPLE, Fleet, Kit, wait_for
from wearfleet_edge.outbox import inspect_outbox

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.broker]


def refusal(*command: str | Path) -> tuple[int, str]:
    """Exit code and the one line that says why; fails when the command succeeds or shows its inside."""
    program = Path(sys.executable).with_name(str(command[0]))
    result = subprocess.run(
        [program, *command[1:]],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return result.returncode, errors[0]


def former_demo(out: Path) -> dict[Path, bytes]:
    """Results of an earlier demonstration."""
    for name in ("summary.json", "report.html", "cloud/wearfleet.db", "model/har.onnx"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"former {name}")
    return files(out)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_demo_with_a_wrong_data_root_leaves_the_former_results(tmp_path: Path) -> None:
    before = former_demo(tmp_path / "demo")
    missing = tmp_path / "nowhere"
    code, error = refusal(
        "wearfleet-cloud", "demo", "--dataset", "hapt", "--data-root", missing, "--out", tmp_path / "demo"
    )
    assert code == 1
    assert str(missing) in error
    assert "--data-root" in error
    assert files(tmp_path / "demo") == before


def test_a_demo_with_a_truncated_archive_leaves_the_former_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # prepared data sets lie below it
    before = former_demo(tmp_path / "demo")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("HAPT Data Set/RawData/labels.txt", "1 1 5 250 1232\n" * 100)
    (tmp_path / "data" / "hapt").mkdir(parents=True)
    (tmp_path / "data" / "hapt" / "HAPT.zip").write_bytes(whole.getvalue()[:-200])
    code, error = refusal(
        "wearfleet-cloud",
        "demo",
        "--dataset",
        "hapt",
        "--data-root",
        tmp_path / "data",
        "--out",
        tmp_path / "demo",
    )
    assert code == 1
    assert "HAPT.zip" in error
    assert "truncated or damaged" in error
    assert files(tmp_path / "demo") == before
    assert files(tmp_path / "home") == {}


def test_a_demo_whose_page_has_no_port_says_so_before_it_trains(tmp_path: Path) -> None:
    before = former_demo(tmp_path / "demo")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        code, error = refusal("wearfleet-cloud", "demo", "--web-port", port, "--out", tmp_path / "demo")
    assert code == 2
    assert port in error
    assert "choose another --web-port" in error
    assert files(tmp_path / "demo") == before


def test_a_service_on_an_occupied_port_ends_with_the_reason(tmp_path: Path) -> None:
    ports = ("--port", "0", "--enrol-port", "0", "--web-port", "0")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        code, error = refusal("wearfleet-cloud", "serve", "--state", tmp_path, *ports, "--broker-port", port)
    assert code == 2
    assert port in error
    assert "choose another broker.port" in error


def test_tampered_files_are_refused_and_the_fleet_goes_on(kit: Kit, tmp_path: Path) -> None:
    state = ("--state", tmp_path / "fleet" / "cloud")
    with Fleet(tmp_path / "fleet", kit) as fleet:
        fleet.start_service()
        broken = changed_model(kit, tmp_path)
        code, error = refusal("wearfleet-cloud", "models", "publish", broken, *state)
        assert (code, "expected" in error, "sha256" in error) == (1, True, True)
        assert fleet.admin("models", "list") == []

        fleet.admin("models", "publish", str(kit.model))
        code, error = refusal(
            "wearfleet-cloud", "federation", "start", "--plan", changed_plan(kit, tmp_path), *state
        )
        assert (code, "build the plan again" in error) == (1, True)
        assert fleet.admin("federation", "status") == []

        name = PEOPLE[0]
        fleet.enrol(name)
        cut = tmp_path / "cut.npz"
        cut.write_bytes(kit.recordings[name].read_bytes()[:5000])
        code, error = refusal("wearfleet-edge", "run", "--state", fleet.device(name).root, "--recording", cut)
        assert (code, str(cut) in error) == (1, True)

        fleet.start_agent(name, "--speed", "20")
        wait_for(
            "the same device streams a whole recording",
            lambda: fleet.status(name).get("windows_acknowledged"),
        )
        fleet.processes.stop([name])
        assert inspect_outbox(fleet.device(name).outbox).lost == {}


def changed_model(kit: Kit, folder: Path) -> Path:
    """The model with one bit of one weight turned, beside its honest manifest."""
    data = bytearray(kit.model.read_bytes())
    data[len(data) // 2] ^= 1
    model = folder / kit.model.name
    model.write_bytes(data)
    shutil.copy(kit.model.with_suffix(".manifest.json"), folder)
    return model


def changed_plan(kit: Kit, folder: Path) -> Path:
    """The plan with one bit of one graph turned."""
    plan = folder / "plan"
    shutil.copytree(kit.plan, plan)
    graph = min((plan / "graphs").iterdir())
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    return plan
