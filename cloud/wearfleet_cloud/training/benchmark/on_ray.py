"""Spread the runs of a benchmark over the machines of a Ray cluster.

A machine needs this package, the data at the same paths, and nothing of the benchmark's folder: results come back as
bytes and are written here. What is under way when the benchmark is interrupted is made again from its beginning.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from wearfleet_cloud.ray_cluster import ray_cluster
from wearfleet_cloud.training.benchmark.execution import Task, perform
from wearfleet_cloud.training.checkpoint import write_atomically
from wearfleet_cloud.training.trainer import RESULT_FILE

__all__ = ["carry_out", "on_ray"]

Files = dict[str, bytes]
"""Content by the path below the folder of the benchmark."""


def on_ray(tasks: Sequence[Task], address: str) -> Iterator[Task]:
    """Make tasks on a cluster; yields each when its results are written.

    Args:
        tasks: to make.
        address: of the cluster, "auto" for the one this machine belongs to, "local" for one of this machine alone.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    with ray_cluster(address, "--workers") as ray:
        remote = ray.remote(carry_out)
        waiting = {
            remote.options(num_gpus=int(task.cells[0].device != "cpu")).remote(task): task for task in tasks
        }
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            task = waiting.pop(done)
            _write(ray.get(done), task.place.out)
            yield task


def carry_out(task: Task) -> Files:
    """Make a task on a machine of the cluster, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        perform(replace(task, place=replace(task.place, out=here)))
        return {str(file.relative_to(here)): file.read_bytes() for file in here.rglob("*") if file.is_file()}


def _write(files: Files, out: Path) -> None:
    """Write results; the file that says that a run is finished comes last."""
    for name in sorted(files, key=lambda name: (Path(name).name == RESULT_FILE, name)):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out / name, files[name])
