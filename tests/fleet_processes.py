"""A small fleet of real processes: one service with Mosquitto, agents of simulated people, a hastily trained model."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from ports import free_port
from typer.testing import CliRunner
from wearfleet_cloud.cli import create_app
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.simulator import Simulation
from wearfleet_cloud.demo_processes import Processes
from wearfleet_cloud.export import ReleaseInfo, export_classifier
from wearfleet_cloud.export.run_folder import contract_of
from wearfleet_cloud.export.to_onnx import write_release
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_cloud.federated.plan_files import save_plan
from wearfleet_edge.state import StateDirectory, read_json
from wearfleet_models import Classifier, ModelSpec, build_classifier
from wearfleet_protos.recording import save_recordings
from wearfleet_protos.windowing import WindowSpec, cut_labelled

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from wearfleet_protos.plan import InputContract
    from wearfleet_protos.recording import Recording

PEOPLE = ("anna", "ben", "chloe", "dmitri")


@dataclass(frozen=True)
class Kit:
    """What a fleet starts from: a model file, a plan folder, and one recording file a person."""

    model: Path
    plan: Path
    recordings: dict[str, Path]


def make_kit(folder: Path, *, epochs: int, strategy: str = "fedbn", **options: object) -> Kit:
    """Train a classifier for a second, export it, compile a strategy for it, and simulate four people for a minute."""
    model = hasty_model("cnn")
    training = {"epochs": epochs, "batch_size": 8, "learning_rate": 0.01}
    chosen = create_strategy(strategy, {**training, **options})
    plan, graphs = build_plan(chosen, model, simulated_contract(), plan_id="small", seed=2)
    save_plan(folder / "plan", plan, graphs)
    return Kit(write_model(folder / "small.onnx", model), folder / "plan", record_people(folder))


def simulated_contract() -> InputContract:
    """The windows of the simulator."""
    return contract_of(dataset_named("simulator"))


def hasty_model(backbone: str, **sizes: int) -> Classifier:
    """A classifier after thirty steps of Adam on two people without a device: enough to tell walking from lying."""
    x, y = _seen_windows()
    contract = simulated_contract()
    spec = ModelSpec(backbone, 6, contract.window, len(contract.labels), **sizes)
    model = build_classifier(spec, seed=1)
    model.standardise.mean.copy_(torch.from_numpy(x.mean(axis=(0, 2))))
    model.standardise.std.copy_(torch.from_numpy(x.std(axis=(0, 2))))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimiser.step()
    return model.eval()


def write_model(file: Path, model: Classifier, version: int = 1) -> Path:
    """Export a model to be published, its manifest beside it."""
    x, y = _seen_windows()
    info = ReleaseInfo("small", version, "hasty", "Apache-2.0", simulated=True, created_ns=1)
    release = export_classifier(model, simulated_contract(), info, x=x, y=y, x_validation=x, method="energy")
    write_release(file, release.data, release.manifest)
    return file


def record_people(folder: Path) -> dict[str, Path]:
    """A recording file of each person who has a device."""
    files = {name: folder / f"{name}.npz" for name in PEOPLE}
    for file, person in zip(files.values(), _people(), strict=False):
        save_recordings(file, [person], dataset_named("simulator").label_names)
    return files


@cache
def _people() -> list[Recording]:
    """Six people, a minute each: those with devices, then two that no device ever sees."""
    simulation = Simulation(persons=len(PEOPLE) + 2, sessions=1, bouts=1, bout_s=8.0, seed=3)
    return list(simulation.read(None, lambda *_: None))


def _seen_windows() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Windows and classes of the two people without a device."""
    contract = simulated_contract()
    spec = WindowSpec(contract.window, contract.stride, contract.rate_hz)
    seen = [cut_labelled(person, spec).labelled() for person in _people()[len(PEOPLE) :]]
    return np.concatenate([part.x for part in seen]), np.concatenate([part.y for part in seen])


class Fleet:
    """Processes of one service and its agents, below one folder.

    Use as a context: at its end everything is stopped, Mosquitto too when its service was killed.

    Args:
        root: folder of its own, for state and logs.
        kit: what it starts from.
        edge: program of the agents, for instance of another environment.
    """

    def __init__(self, root: Path, kit: Kit, edge: str = "wearfleet-edge") -> None:
        self.kit = kit
        self.edge = edge
        self.root = root
        self.cloud = root / "cloud"
        self.processes = Processes(root / "logs")
        self.pids: dict[str, int] = {}
        self.device_ids: dict[str, str] = {}
        self.ready: dict[str, Any] = {}
        self._ports = {name: free_port() for name in ("port", "enrol-port", "web-port", "broker-port")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids.values():  # a stopped process cannot end
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.processes.stop_all()
        with suppress(OSError, ValueError):  # the service removes the file when it ends by itself
            os.kill(int((self.cloud / "broker" / "mosquitto.pid").read_text()), signal.SIGTERM)

    def start_service(self, *options: str) -> dict[str, Any]:
        """Start it, on the same ports each time; what it says when it is ready."""
        flags = [word for name, port in self._ports.items() for word in (f"--{name}", str(port))]
        command = ["wearfleet-cloud", "serve", "--state", str(self.cloud), *flags, *options, "--json"]
        self.pids["service"] = self.processes.start("service", command).pid
        self.ready = dict(self.processes.ready_line("service"))
        return self.ready

    def admin(self, *command: str) -> Any:
        """A command of the service's operator, in this process, which has loaded what it needs; its JSON."""
        words = [*command, "--state", str(self.cloud), "--json"]
        result = CliRunner().invoke(create_app(), words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def enrol(self, name: str) -> None:
        """Give a person's device its identity."""
        ticket = self.admin("devices", "enrol-code", "--name", name)["ticket"]
        place = str(self.device(name).root)
        command = [self.edge, "enrol", ticket, "--state", place, "--json"]
        self.device_ids[name] = self.processes.call(f"enrol-{name}", command)["device_id"]

    def start_agent(self, name: str, *options: str) -> None:
        """Start a person's agent, which replays the person's recording."""
        place = str(self.device(name).root)
        command = [self.edge, "run", "--state", place, "--recording", str(self.kit.recordings[name])]
        self.pids[name] = self.processes.start(name, [*command, *options, "--json"]).pid

    def kill(self, name: str) -> None:
        """``kill -9``: no handler runs, nothing is flushed."""
        os.kill(self.pids[name], signal.SIGKILL)
        self.processes.stop([name])

    def device(self, name: str) -> StateDirectory:
        """The state directory of a person's agent."""
        return StateDirectory(self.root / "devices" / name)

    def status(self, name: str) -> dict[str, Any]:
        """What an agent said last; empty before its first word."""
        path = self.device(name).status
        return read_json(path) if path.exists() else {}

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Read the service's database, also while it runs."""
        with closing(sqlite3.connect(f"file:{self.cloud / 'wearfleet.db'}?mode=ro", uri=True)) as database:
            return database.execute(query, values).fetchall()


def wait_for(what: str, true: Callable[[], object], seconds: float = 90.0, every: float = 0.02) -> None:
    """Wait until ``true()``, or fail and say what did not happen."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, f"within {seconds} s this did not happen: {what}"
        time.sleep(every)
