"""Aggregate more updates than memory holds, from a file mapped into it: seconds, and what lay beside the file.

    python tests/benchmarks/kernels/stream_updates.py [--updates 4096] [--size 10000000] [--rules mean median]

The file is sparse: reading its holes gives zeros and takes no room on disk. Time and memory of the mean and the norms
do not depend on the numbers; zeros are quicker to sort than others.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

import numpy as np
import torch
from wearfleet_cloud.kernels import robust

_RULES = {
    "mean": lambda updates, device: robust.weighted_mean(updates, torch.ones(len(updates)), device=device),
    "norms": lambda updates, device: robust.squared_norms(updates, device=device),
    "median": lambda updates, device: robust.coordinate_median(updates, device=device),
    "trimmed": lambda updates, device: robust.trimmed_mean(updates, len(updates) // 5, device=device),
    "distances": lambda updates, device: robust.squared_distances(updates, device=device),
}
_STATUS = Path("/proc/self/status")


def own_bytes() -> int:
    """Memory of this process without pages of mapped files, which the system takes back when it needs them."""
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
    with tempfile.NamedTemporaryFile(suffix=".f32") as file:
        os.truncate(file.name, 4 * options.updates * options.size)
        mapped = np.memmap(file.name, np.float32, "r+", shape=(options.updates, options.size))
        updates = torch.from_numpy(mapped)
        for rule in options.rules:
            begin = time.perf_counter()
            with Peak() as peak:
                found = _RULES[rule](updates, torch.device(options.device))
            taken, beside = time.perf_counter() - begin, (peak.most - peak.before) / 2**20
            print(
                f"{rule}: {options.updates} x {options.size} of {updates.nbytes / 2**30:.0f} GiB on {options.device}: "
                f"{taken:.1f} s, at most {beside:.0f} MiB beside them, the result is {found.nbytes / 2**20:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
