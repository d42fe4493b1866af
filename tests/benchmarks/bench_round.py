"""A federated round over real gRPC on loopback beside Flower 1.41 and bare streams of the same bytes, interleaved.

    python tests/benchmarks/bench_round.py [--flower-python .venv-flower/bin/python] [--out FILE.csv]

Ours is the whole service as ``wearfleet-cloud serve`` starts it (mutual TLS, SQLite and artifacts on disk) with devices
that use the agent's transport and checks; Flower's is ``start_server`` and ``start_client``, without TLS (what the
target means) and, for comparison, with TLS that proves the server only. Every client is a process of its own and
echoes: it returns as many bytes as it got. The first round of each block is left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
from bench_report import Row, print_table, row, write_csv
from round_peers import Case, Flower, Raw, Wearfleet
from wearfleet_cloud.service.broker import free_port

CASES = (Case(8, 1_000_000), Case(32, 100_000))
FLOWER = "flwr==1.41.0"
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    given = _arguments()
    python = given.flower_python or _flower_environment(ROOT / ".venv-flower")
    rows = [entry for case in CASES for entry in measure(case, python, given.rounds, given.blocks)]
    print_table(rows)
    write_csv(given.out, rows, ("grpcio", "protobuf", "numpy", "SQLAlchemy"))
    print(f"written to {given.out}", file=sys.stderr)


def measure(case: Case, python: Path, rounds: int, blocks: int) -> list[Row]:
    """All providers of one case; ``rounds`` counted ones a block."""
    seconds: dict[str, list[float]] = {"wearfleet": [], "raw stream": [], "raw stream, TLS": []}
    with tempfile.TemporaryDirectory(prefix="wearfleet-round-") as folder:
        ours = Wearfleet(case, Path(folder))
        raw = Raw(case, ours)
        flowers = {
            name: Flower(case, python, rounds, blocks, free_port("127.0.0.1", 0, "flower"), keys)
            for name, keys in (("flower 1.41", None), ("flower 1.41, TLS", ours.server_files))
        }
        try:
            raw.wait_ready()
            for name, flower in flowers.items():
                flower.wait_ready()
                seconds[name] = []
            for block in range(blocks):
                if block == 1:
                    ours.reset_peak()  # start-up and enrolment are not what a round needs
                seconds["wearfleet"] += ours.block(rounds)
                for name, flower in flowers.items():
                    seconds[name] += flower.block(rounds)
                seconds["raw stream"] += raw.block("plain", rounds)
                seconds["raw stream, TLS"] += raw.block("tls", rounds)
            return _rows(case, seconds, ours, flowers)
        finally:
            for peer in (*flowers.values(), raw, ours):
                peer.close()


def _rows(
    case: Case, seconds: dict[str, list[float]], ours: Wearfleet, flowers: dict[str, Flower]
) -> list[Row]:
    def entry(provider: str, metric: str, unit: str, values: list[float]) -> Row:
        return row(values, benchmark="round", case=case.name, provider=provider, metric=metric, unit=unit)

    moved = 2 * 4 * case.values * case.clients
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    rows = [entry(name, "round", "ms", [1e3 * value for value in values]) for name, values in seconds.items()]
    rows.append(
        entry("wearfleet", "round seen by clients", "ms", [1e3 * value for value in ours.client_seconds])
    )
    rows += [entry(name, "bytes moved", "GB/s", [1e-9 * moved / value]) for name, value in median.items()]
    rows += [
        entry("wearfleet", f"share of {name}", "%", [100 * median[name] / median["wearfleet"]])
        for name in ("raw stream", "raw stream, TLS")
    ]
    rows.append(entry("wearfleet", "server CPU a round", "ms", [1e3 * value for value in ours.server_cpu]))
    rows.append(entry("wearfleet", "clients' CPU a round", "ms", [1e3 * value for value in ours.clients_cpu]))
    rows.append(entry("wearfleet", "server peak memory", "MiB", [ours.peak_mib()]))
    for name, flower in flowers.items():
        rows.append(
            entry(name, "server's and clients' CPU a round", "ms", [1e3 * value for value in flower.cpu])
        )
        rows.append(entry(name, "server peak memory", "MiB", [flower.peak_mib]))
        rows.append(
            entry("wearfleet", f"times faster than {name}", "x", [median[name] / median["wearfleet"]])
        )
    return rows


def _flower_environment(folder: Path) -> Path:
    """Python of an environment with Flower, made when it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", FLOWER], check=True)
    return python


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--flower-python", type=Path, help="of an environment with Flower; made when not given"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds a block")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/round.csv"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
