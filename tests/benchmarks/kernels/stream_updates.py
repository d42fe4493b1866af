"""Aggregate more updates than memory holds: seconds, and what lay beside them.

    python tests/benchmarks/kernels/stream_updates.py [--updates 4096] [--size 10000000] [--rules mean median]

The updates are one row seen K times, which takes the memory of one and is sliced like any others; every rule must
give the row back, or nothing for distances. Equal numbers are quicker to sort than others.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Self

import torch
from wearfleet_cloud.kernels import robust

_RULES = {
    "mean": lambda updates, device: robust.weighted_mean(updates, torch.ones(len(updates)), device=device),
    "median": lambda updates, device: robust.coordinate_median(updates, device=device),
    "trimmed": lambda updates, device: robust.trimmed_mean(updates, len(updates) // 5, device=device),
    "distances": lambda updates, device: robust.squared_distances(updates, device=device),
}
_STATUS = Path("/proc/self/status")


def own_bytes() -> int:
    """Memory of this process without pages of mapped files."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


class Peak:
    """The most memory that the process had of its own while a block ran, looked at 50 times a second."""

    def __enter__(self) -> Self:
        self.before = self.most = own_bytes()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="peak of memory", daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, own_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()


def main() -> None:
    """As the first lines of this file say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=4096)
    parser.add_argument("--size", type=int, default=10_000_000)
    parser.add_argument("--rules", nargs="*", choices=list(_RULES), default=["mean"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    row = torch.randn(options.size, generator=torch.Generator().manual_seed(0))
    updates = row.expand(options.updates, -1)
    for rule in options.rules:
        begin = time.perf_counter()
        with Peak() as peak:
            found = _RULES[rule](updates, torch.device(options.device))
        taken, beside = time.perf_counter() - begin, (peak.most - peak.before) / 2**20
        torch.testing.assert_close(found, row if found.dim() == 1 else torch.zeros_like(found))
        print(
            f"{rule}: {options.updates} x {options.size}, {updates.nbytes / 2**30:.0f} GiB, on {options.device}: "
            f"{taken:.1f} s, at most {beside:.0f} MiB beside them, the result is {found.nbytes / 2**20:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
