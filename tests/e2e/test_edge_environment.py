"""The device's environment as a user gets it: ``pip install '.[edge]'`` into a fresh virtual environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fleet_processes import PEOPLE, Fleet, Kit, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("protos", "models", "cloud", "edge")
FORBIDDEN = ("torch", "onnx", "onnxscript", "triton")
IMPORT_ALL = """
import importlib, pkgutil, sys
import wearfleet_edge, wearfleet_protos
names = [
    module.name
    for package in (wearfleet_edge, wearfleet_protos)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]
for name in names:
    importlib.import_module(name)
cloud = ("torch", "onnx", "onnxscript", "triton", "sqlalchemy", "scipy", "wearfleet_cloud", "wearfleet_models")
print(len(names), sorted({name.split(".")[0] for name in sys.modules} & set(cloud)))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the edge extra, installed from a copy of the sources through the package index."""
    folder = tmp_path_factory.mktemp("edge-environment")
    source = folder / "source"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    home = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    subprocess.run(
        [home / "bin" / "python", "-m", "pip", "install", "--quiet", f"{source}[edge]"],
        check=True,
        timeout=300,
    )
    return home


def answer(environment: Path, code: str) -> str:
    """What a program prints in that environment."""
    command = [environment / "bin" / "python", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_nothing_of_torch_or_onnx_is_there(environment: Path) -> None:
    code = "import importlib.util as u; print([n for n in {!r} if u.find_spec(n)])"
    assert answer(environment, code.format(FORBIDDEN)) == "[]"


def test_every_module_of_the_agent_is_imported_without_the_cloud(environment: Path) -> None:
    count, found = answer(environment, IMPORT_ALL).split(" ", 1)
    assert int(count) > 35
    assert found == "[]"


def test_the_environment_takes_less_than_250_mb_of_disk(environment: Path) -> None:
    """Blocks on disk of all files, compiled ones too, in 10**6 bytes; without pip and setuptools, which no agent needs.

    Those two, which ``venv`` puts into every environment, are another 28 MB with Python 3.11.
    """
    tools = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
    (packages,) = environment.glob("lib/python3*/site-packages")
    counted = (
        p for p in environment.rglob("*") if not any(p.is_relative_to(packages / tool) for tool in tools)
    )
    assert sum(path.lstat().st_blocks * 512 for path in counted) < 250e6


def test_the_clouds_command_says_what_is_missing(environment: Path) -> None:
    command = [environment / "bin" / "wearfleet-cloud", "doctor"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'wearfleet[cloud]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.broker
def test_its_agent_streams_and_trains_below_100_mb(environment: Path, kit: Kit, tmp_path: Path) -> None:
    """As on a device that has restarted since the installation: see ``private_bytes`` of the agent."""
    forget_cached_libraries(environment)
    name = PEOPLE[0]
    with Fleet(tmp_path, kit, edge=str(environment / "bin" / "wearfleet-edge")) as fleet:
        fleet.start_service()
        fleet.admin("models", "publish", str(kit.model))
        fleet.enrol(name)
        fleet.start_agent(name, "--speed", "20", "--repeat", "--share-raw-windows")
        fleet.admin("federation", "start", "--plan", str(kit.plan), "--rounds", "3")
        resident: list[float] = []

        def personalised() -> bool:
            resident.append(resident_mb(fleet.pids[name]))
            return bool(fleet.status(name).get("personalised"))

        wait_for("the agent has trained and personalised", personalised)
        wait_for("it streams on", lambda: fleet.status(name)["windows_acknowledged"] > 50)
        status = fleet.status(name)
    assert max(resident) < 100.0
    assert status["private_mb"] < 60.0
    assert status["federated_rounds"] == 4
    assert status["torch_imported"] is False


def forget_cached_libraries(environment: Path) -> None:
    """Let the system drop the libraries' contents from its file cache, where the installation has just put them."""
    for library in environment.rglob("*.so*"):
        with library.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_mb(pid: int) -> float:
    """Resident memory of a process in megabytes (10**6 bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0
