"""The three that ``bench_round.py`` compares, each in processes of its own, each doing a block of rounds when told."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench_report import Children, ask, cpu_seconds, family_cpu_seconds, line, peak_mib, reset_peak  # noqa: E402
from service_harness import begin_run, enrolment_ticket, service_settings  # noqa: E402
from wearfleet_cloud.config import Settings  # noqa: E402
from wearfleet_cloud.service.state import open_state  # noqa: E402
from wearfleet_cloud.storage.run_records import find_run, list_rounds  # noqa: E402
from wearfleet_edge.enrolment import enrol_device  # noqa: E402
from wearfleet_edge.process import _ENVIRONMENT as AGENT_ENVIRONMENT  # noqa: E402
from wearfleet_edge.state import StateDirectory  # noqa: E402

BLOCK_S = 120.0


@dataclass(frozen=True)
class Case:
    """So many clients with a model of so many float32."""

    clients: int
    values: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.clients} x {self.values}"


class Wearfleet:
    """Our whole service as ``wearfleet-cloud serve`` starts it, and enrolled devices, all idle until a run starts."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case, self._folder, self._children = case, folder, Children()
        self._settings: Settings = service_settings(folder / "state")
        command = (Path(sys.executable).with_name("wearfleet-cloud"), "serve", "--state", folder / "state")
        ports = [
            word for name in ("--port", "--enrol-port", "--web-port", "--broker-port") for word in (name, "0")
        ]
        self._service = self._children.start(*command, *ports, "--json", stderr=subprocess.DEVNULL)
        ready = json.loads(line(self._service.stdout))
        for number in range(case.clients):
            ticket = enrolment_ticket(
                self._settings, f"{ready['host']}:{ready['enrol_port']}", f"device{number}"
            )
            enrol_device(StateDirectory(self.device(number)), ticket.encode())
        self._devices = [self._start_device(number) for number in range(case.clients)]
        self.client_seconds: list[float] = []
        self.server_cpu: list[float] = []
        self.clients_cpu: list[float] = []

    def device(self, number: int) -> Path:
        """State folder of a device."""
        return self._folder / "devices" / str(number)

    @property
    def server_files(self) -> Path:
        """Folder with certificate and key of the service."""
        return self._folder / "state" / "keys"

    def _start_device(self, number: int) -> subprocess.Popen[str]:
        command = (sys.executable, HERE / "echo_device.py", self.device(number), number + 1)
        return self._children.start(*command, environment=AGENT_ENVIRONMENT)

    def peak_mib(self) -> float:
        """Largest resident memory of the service."""
        return peak_mib(self._service.pid)

    def reset_peak(self) -> None:
        """Count it anew."""
        reset_peak(self._service.pid)

    def block(self, rounds: int) -> list[float]:
        """Seconds from open to published, by the server's records, of a run's rounds without the first one."""
        cpu = self._cpu()
        run_id = begin_run(
            self._settings,
            {"weight": (self._case.values,)},
            rounds=1 + rounds,
            min_clients=self._case.clients,
        )
        seconds = self._finished(run_id, rounds)
        used = self._cpu()
        self.server_cpu.append((used[0] - cpu[0]) / (1 + rounds))
        self.clients_cpu.append((used[1] - cpu[1]) / (1 + rounds))
        self.client_seconds += self._seen_by_clients(rounds)
        return seconds

    def close(self) -> None:
        """End the service and the devices."""
        self._children.close()

    def _cpu(self) -> tuple[float, float]:
        return cpu_seconds(self._service.pid), sum(cpu_seconds(device.pid) for device in self._devices)

    def _finished(self, run_id: str, rounds: int) -> list[float]:
        state = open_state(self._settings)
        until = time.monotonic() + BLOCK_S
        try:
            while True:
                time.sleep(0.2)
                with state.database.read() as connection:
                    if find_run(connection, run_id).state != "running":
                        rows = list_rounds(connection, run_id)
                        break
                if time.monotonic() > until:
                    sys.exit(f"run {run_id} did not end in time")
        finally:
            state.database.close()
        bad = [entry.state for entry in rows if entry.state != "published"]
        if bad or len(rows) != 1 + rounds:
            sys.exit(f"run {run_id}: {len(rows)} rounds, not published: {bad}")
        whole = 4 * self._case.values * self._case.clients
        if any(entry.bytes_up < whole or entry.bytes_down < whole for entry in rows):
            sys.exit(f"run {run_id}: a round moved less than {whole} bytes each way")
        return [((entry.closed_ns or 0) - entry.opened_ns) * 1e-9 for entry in rows[1:]]

    def _seen_by_clients(self, rounds: int) -> list[float]:
        """From the first answered poll of a round to that of the next."""
        first: dict[int, float] = defaultdict(lambda: float("inf"))
        for device in self._devices:
            for _ in range(1 + rounds):
                said = json.loads(line(device.stdout))
                first[said["round"]] = min(first[said["round"]], said["at"])
        return [first[number + 1] - first[number] for number in range(2, 1 + rounds)]


class Flower:
    """Flower's server and clients; without TLS, as its quick start has them, or with the certificate in ``keys``."""

    def __init__(
        self, case: Case, python: Path, rounds: int, blocks: int, port: int, keys: Path | None = None
    ) -> None:
        self._children = Children()
        self.peak_mib = 0.0
        self.cpu: list[float] = []
        self._server = self._children.start(
            python, HERE / "flower_echo.py", "--clients", case.clients, "--parameters", case.values,
            "--rounds", (1 + rounds) * blocks, "--block", 1 + rounds, "--port", port,
            *(("--keys", keys) if keys else ()), stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def wait_ready(self) -> None:
        """Every client is connected."""
        assert line(self._server.stdout) == "ready"

    def block(self, rounds: int) -> list[float]:
        """Seconds of all rounds but the first."""
        cpu = family_cpu_seconds(self._server.pid)
        ask(self._server, "go", 0)
        seconds = [float(line(self._server.stdout)) for _ in range(rounds)]
        self.peak_mib = peak_mib(self._server.pid)
        self.cpu.append((family_cpu_seconds(self._server.pid) - cpu) / rounds)
        return [*seconds, float(line(self._server.stdout))][1:]  # after its last round the server ends

    def close(self) -> None:
        """End the server and its clients."""
        self._children.close()


class Raw:
    """Bare gRPC streams; ``kind`` of a block is ``plain`` or ``tls``."""

    def __init__(self, case: Case, ours: Wearfleet) -> None:
        self._children = Children()
        size = 4 * case.values
        self._server = self._children.start(
            sys.executable, HERE / "raw_stream.py", "serve", size, case.clients, ours.server_files
        )
        ports = json.loads(line(self._server.stdout))
        for number in range(case.clients):
            self._children.start(
                sys.executable, HERE / "raw_stream.py", "client", size,
                f"localhost:{ports['plain']}", f"localhost:{ports['tls']}", ours.device(number) / "identity",
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Every client is connected."""
        assert line(self._server.stdout) == "ready"

    def block(self, kind: str, rounds: int) -> list[float]:
        """Seconds of all rounds but the first."""
        return [float(ask(self._server, kind, 1)[0]) for _ in range(1 + rounds)][1:]

    def close(self) -> None:
        """End the server and its clients."""
        self._children.close()
