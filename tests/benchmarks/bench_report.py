"""What the benchmarks of the service share: quantiles, rows of a CSV file with facts, what processes cost."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

import numpy as np

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Row:
    """One measured value of one provider in one case: median and the 20th and 80th percentile."""

    benchmark: str
    case: str
    provider: str
    metric: str
    unit: str
    p20: float
    median: float
    p80: float
    samples: int


def row(values: Sequence[float], *, benchmark: str, case: str, provider: str, metric: str, unit: str) -> Row:
    """The row of some repetitions of one measurement."""
    p20, median, p80 = (float(np.percentile(values, q)) for q in (20, 50, 80))
    return Row(benchmark, case, provider, metric, unit, p20, median, p80, len(values))


def write_csv(path: Path, rows: Iterable[Row], packages: Sequence[str]) -> None:
    """Rows with the facts that a reader needs to repeat them."""
    facts = {
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": " ".join(f"{name} {version(name)}" for name in packages),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_1min": f"{os.getloadavg()[0]:.2f}",
    }
    lines = [{**asdict(entry), **facts} for entry in rows]
    for line in lines:
        line.update({name: f"{line[name]:.6g}" for name in ("p20", "median", "p80")})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def print_table(rows: Iterable[Row]) -> None:
    """The rows for people."""
    print(f"{'case':14} {'provider':26} {'metric':24} {'median':>10} {'p20':>10} {'p80':>10} unit")
    for entry in rows:
        numbers = " ".join(f"{value:10.4g}" for value in (entry.median, entry.p20, entry.p80))
        print(f"{entry.case:14} {entry.provider:26} {entry.metric:24} {numbers} {entry.unit}")


class Children:
    """Processes that are ended with the block."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def start(
        self, *command: object, stderr: int | None = None, environment: Mapping[str, str] = {}
    ) -> subprocess.Popen[str]:
        """A child with pipes for its input and output."""
        child = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=ENVIRONMENT | environment,
        )  # fmt: skip
        self._stack.callback(_end, child)
        return child

    def close(self) -> None:
        """End them, the last one first."""
        self._stack.close()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def family_cpu_seconds(pid: int) -> float:
    """The same of a process and its children together."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return cpu_seconds(pid) + sum(cpu_seconds(int(child)) for child in children)


def peak_mib(pid: int) -> float:
    """Largest resident memory of a process so far."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


def reset_peak(pid: int) -> None:
    """Begin to count the largest resident memory anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def ask(child: subprocess.Popen[str], order: str, answers: int) -> list[str]:
    """Write an order to a child and read so many lines."""
    assert child.stdin is not None
    child.stdin.write(order + "\n")
    child.stdin.flush()
    return [line(child.stdout) for _ in range(answers)]


def line(stream: IO[str] | None) -> str:
    """The next line of a child; ends the benchmark when there is none."""
    assert stream is not None
    text = stream.readline()
    if not text:
        sys.exit("a process of the benchmark ended early")
    return text.strip()


def _end(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.wait(20)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
