"""Telemetry through Mosquitto at QoS 1 over TLS into the database, beside a subscriber that only counts.

    python tests/benchmarks/bench_ingest.py [--devices 4] [--windows 5000] [--blocks 3] [--out FILE.csv]

Ours is the whole service as ``wearfleet-cloud serve`` starts it, with its own Mosquitto; the bare subscriber has
another Mosquitto with the same configuration. Both take turns. Each publisher is a process of its own. The
rate counts from the release of the publishers until everything is in SQLite (ours) or was counted (bare). Every message
must be there once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import sqlalchemy as sa  # noqa: E402
from bench_report import Children, Row, ask, cpu_seconds, line, peak_mib, print_table, row, write_csv  # noqa: E402
from service_harness import enrolment_ticket, service_settings  # noqa: E402
from wearfleet_cloud.fleet.identity import ServerFiles  # noqa: E402
from wearfleet_cloud.service.broker import free_port  # noqa: E402
from wearfleet_cloud.service.mosquitto_files import access_list, configuration  # noqa: E402
from wearfleet_cloud.storage.database import Database  # noqa: E402
from wearfleet_cloud.storage.tables import predictions, streams, windows  # noqa: E402
from wearfleet_edge.enrolment import enrol_device  # noqa: E402
from wearfleet_edge.state import StateDirectory  # noqa: E402

CASES = ("window", "prediction", "window+prediction")
BLOCK_S = 120.0


class Fleet:
    """The service, a second Mosquitto, and enrolled devices."""

    def __init__(self, folder: Path, devices: int) -> None:
        self._folder, self.children = folder, Children()
        settings = service_settings(folder / "state")
        command = [Path(sys.executable).with_name("wearfleet-cloud"), "serve", "--state", folder / "state"]
        for name in ("--port", "--enrol-port", "--web-port", "--broker-port"):
            command += [name, "0"]
        self.service = self.children.start(*command, "--json", stderr=subprocess.DEVNULL)
        ready = json.loads(line(self.service.stdout))
        self.port = int(ready["broker"]["port"])
        self.devices = [folder / f"device{number}" for number in range(devices)]
        for number, device in enumerate(self.devices):
            ticket = enrolment_ticket(settings, f"{ready['host']}:{ready['enrol_port']}", f"device{number}")
            enrol_device(StateDirectory(device), ticket.encode())
        self.database = Database(settings.database.url)
        self.bare_port = free_port("127.0.0.1", 0, "mosquitto")
        self._start_bare()

    @property
    def keys(self) -> Path:
        """Folder of the service's certificate."""
        return self._folder / "state" / "keys"

    def _start_bare(self) -> None:
        folder = self._folder / "bare"
        folder.mkdir()
        files = ServerFiles(self.keys / "server.pem", self.keys / "server.key", self.keys / "ca.pem")
        (folder / "access.conf").write_text(access_list(()))
        text = configuration(folder, files, "127.0.0.1", self.bare_port, 1_000_000)
        (folder / "mosquitto.conf").write_text(text)
        self.children.start("mosquitto", "-c", folder / "mosquitto.conf", stderr=subprocess.DEVNULL)
        time.sleep(1.0)

    def publish(self, port: int, kinds: str, count: int) -> list[subprocess.Popen[str]]:
        """Publishers, ready to begin."""
        made = [
            self.children.start(sys.executable, HERE / "stream_device.py", device, port, kinds, count)
            for device in self.devices
        ]
        for child in made:
            assert line(child.stdout) == "ready"
        return made

    def stored(self) -> tuple[int, int, int]:
        """Messages that the service counts as received, as duplicates, and rows that are really there."""
        counted = sa.select(sa.func.sum(streams.c.received), sa.func.sum(streams.c.duplicated))
        with self.database.read() as connection:
            received, duplicated = connection.execute(counted).one()
            rows = sum(
                connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
                for table in (windows, predictions)
            )
        return int(received or 0), int(duplicated or 0), rows

    def received(self) -> int:
        """The first of these, quickly."""
        with self.database.read() as connection:
            return int(connection.execute(sa.select(sa.func.sum(streams.c.received))).scalar_one() or 0)


def ours(fleet: Fleet, kinds: str, count: int) -> tuple[float, float]:
    """Seconds until everything is stored, and the service's CPU seconds in them."""
    expected = len(kinds.split("+")) * count * len(fleet.devices)
    before = fleet.stored()
    publishers = fleet.publish(fleet.port, kinds, count)
    cpu, began = cpu_seconds(fleet.service.pid), time.perf_counter()
    _release(publishers)
    while fleet.received() < before[0] + expected:
        if time.perf_counter() - began > BLOCK_S:
            sys.exit(f"lost: {fleet.received() - before[0]} of {expected} messages were stored")
        time.sleep(0.02)
    seconds, cpu = time.perf_counter() - began, cpu_seconds(fleet.service.pid) - cpu
    _finish(publishers)
    after = fleet.stored()
    if (after[0] - before[0], after[1] - before[1], after[2] - before[2]) != (expected, 0, expected):
        sys.exit(
            f"{expected} messages were sent; received, duplicated and stored changed from {before} to {after}"
        )
    return seconds, cpu


def bare(fleet: Fleet, kinds: str, count: int) -> float:
    """Seconds until a subscriber has counted everything."""
    expected = len(kinds.split("+")) * count * len(fleet.devices)
    subscriber = fleet.children.start(
        sys.executable, HERE / "bare_subscriber.py", fleet.keys, fleet.bare_port, expected
    )
    assert line(subscriber.stdout) == "ready"
    publishers = fleet.publish(fleet.bare_port, kinds, count)
    _release(publishers)
    seconds = float(line(subscriber.stdout))
    _finish(publishers)
    return seconds


def measure(fleet: Fleet, kinds: str, given: argparse.Namespace) -> list[Row]:
    """All rows of one case."""
    messages = len(kinds.split("+")) * given.windows * len(fleet.devices)
    rates: dict[str, list[float]] = {"wearfleet": [], "bare subscriber": []}
    cpu = []
    for _ in range(given.blocks):
        seconds, used = ours(fleet, kinds, given.windows)
        rates["wearfleet"].append(messages / seconds)
        cpu.append(1e6 * used / messages)
        rates["bare subscriber"].append(messages / bare(fleet, kinds, given.windows))

    def entry(provider: str, metric: str, unit: str, values: list[float]) -> Row:
        return row(values, benchmark="ingest", case=kinds, provider=provider, metric=metric, unit=unit)

    rows = [entry(name, "messages", "1/s", values) for name, values in rates.items()]
    per_window = len(kinds.split("+"))
    rows.append(entry("wearfleet", "windows", "1/s", [rate / per_window for rate in rates["wearfleet"]]))
    shares = [100 * a / b for a, b in zip(rates["wearfleet"], rates["bare subscriber"], strict=True)]
    rows.append(entry("wearfleet", "share of bare subscriber", "%", shares))
    rows.append(entry("wearfleet", "service CPU a message", "us", cpu))
    rows.append(entry("wearfleet", "lost or counted twice", "messages", [0.0] * given.blocks))
    return rows


def _release(publishers: list[subprocess.Popen[str]]) -> None:
    for child in publishers:
        ask(child, "go", 0)


def _finish(publishers: list[subprocess.Popen[str]]) -> None:
    for child in publishers:
        float(line(child.stdout))
        child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--windows", type=int, default=5000, help="of each device and block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/ingest.csv"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wearfleet-ingest-") as folder:
        fleet = Fleet(Path(folder), given.devices)
        try:
            rows = [entry for kinds in CASES for entry in measure(fleet, kinds, given)]
            peak = [peak_mib(fleet.service.pid)]
            rows.append(
                row(
                    peak,
                    benchmark="ingest",
                    case="all",
                    provider="wearfleet",
                    metric="peak memory",
                    unit="MiB",
                )
            )
        finally:
            fleet.database.close()
            fleet.children.close()
    print_table(rows)
    write_csv(given.out, rows, ("paho-mqtt", "SQLAlchemy", "protobuf"))
    print(f"written to {given.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
