"""Preparing real data sets into the cache, and loading them again: seconds.

    python tests/benchmarks/bench_data.py --data-root DATA [--out FILE.csv]

The target is that a second load takes less than two seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench_report import Row, print_table, row, write_csv
from wearfleet_cloud.data import DATASETS
from wearfleet_cloud.data.prepared import prepare
from wearfleet_protos.errors import DataError

if TYPE_CHECKING:
    from wearfleet_cloud.data.dataset import Dataset

LOADS = 5


def main() -> None:
    given = _arguments()
    rows: list[Row] = []
    for dataset in DATASETS.values():
        try:
            rows += measure(dataset, given.data_root)
        except DataError as error:
            print(f"{dataset.name} is left out: {error}", file=sys.stderr)
    print_table(rows)
    write_csv(given.out, rows, ("numpy",))
    print(f"written to {given.out}", file=sys.stderr)


def measure(dataset: Dataset, root: Path) -> list[Row]:
    """One preparation from the distribution, then loads from the cache.

    Raises:
        DataError: the distribution is not there.
    """
    seconds = []
    with tempfile.TemporaryDirectory(prefix="wearfleet-data-") as cache:
        for _ in range(1 + LOADS):
            begin = time.perf_counter()
            prepare(dataset, root, Path(cache))
            seconds.append(time.perf_counter() - begin)

    def entry(metric: str, values: list[float]) -> Row:
        return row(values, benchmark="data", case=dataset.name, provider="wearfleet", metric=metric, unit="s")

    return [entry("prepare", seconds[:1]), entry("load again", seconds[1:])]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Preparing and loading real data sets.")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/data.csv"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
