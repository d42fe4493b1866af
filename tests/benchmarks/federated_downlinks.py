"""What it would gain to send a device the difference to the version it has instead of the whole global model.

Run, from the repository root, with ``WEARFLEET_DATA_ROOT`` set:
``python tests/benchmarks/federated_downlinks.py hapt docs/results/federated-downlinks.csv``. Federated averaging with
uncompressed updates, real data, simulated rounds. Lossless ways give the tensors to the bit. A coded difference does
not: its error is beside it, as a share of the change between the two versions.
"""

from __future__ import annotations

import csv
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from wearfleet_cloud.cli.simulate import _model
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import default_cache_dir, prepare
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Arrays
from wearfleet_cloud.federated.simulate import Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient, people
from wearfleet_cloud.federated.stacked_clients import ClientRound, Kept, StackedClients
from wearfleet_protos.codecs import Residual, UpdateCodec, UpdateFormat
from wearfleet_protos.tensors import TensorSpec

CLIENTS, ROUNDS, GAPS = 10, 20, (1, 2, 4, 8)


class Recorder:
    """A runner that keeps the global tensors of every round."""

    def __init__(self, runner: StackedClients) -> None:
        self._runner, self.specs, self.versions = runner, runner.specs, list[Arrays]()

    def run(
        self,
        round_number: int,
        clients: Sequence[SimulatedClient],
        received: Sequence[Arrays],
        kept: Mapping[str, Kept],
    ) -> list[ClientRound]:
        self.versions.append({name: np.array(array) for name, array in received[0].items()})
        return self._runner.run(round_number, clients, received, kept)


def shuffled(words: np.ndarray) -> bytes:
    """All first bytes, then all second bytes, and so on: what is alike comes together."""
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 4).T).tobytes()


def lossless(old: np.ndarray, new: np.ndarray) -> dict[str, int]:
    """Bytes of float32 numbers ``new`` given ``old``, as differences of their bits."""
    before, after = old.view(np.int32), new.view(np.int32)
    ways = {
        "whole": shuffled(after),
        "xor": shuffled(before ^ after),
        "integers": shuffled(((after - before) << 1) ^ ((after - before) >> 31)),
    }
    return {f"{name}, zlib 9": len(zlib.compress(data, 9)) for name, data in ways.items()}


def coded(name: str, old: Arrays, new: Arrays, specs: Sequence[TensorSpec]) -> tuple[int, float]:
    """Bytes of the difference in a codec, and the error left, as a share of the difference's norm."""
    difference = {s.name: np.asarray(np.subtract(new[s.name], old[s.name])) for s in specs}
    update_format = UpdateFormat(tuple(specs), UpdateCodec(name), 0)
    data = update_format.encode(difference, Residual(), round_number=1, client="x").data
    decoded = update_format.decode(data)
    floats = [s.name for s in specs if s.dtype == "float32"]
    lost = sum(float(np.sum((decoded[n] - difference[n]).astype(float) ** 2)) for n in floats)
    moved = sum(float(np.sum(difference[n].astype(float) ** 2)) for n in floats)
    return len(data), (lost / moved) ** 0.5


def main() -> None:
    torch.set_num_threads(1)
    name, file = sys.argv[1], Path(sys.argv[2])
    prepared = prepare(dataset_named(name), Path(os.environ["WEARFLEET_DATA_ROOT"]), default_cache_dir())
    population = Population(people(prepared, CLIENTS))
    model = _model(prepared, population, "cnn", 0)
    recorder = Recorder(StackedClients(create_strategy("fedavg", {}), model, 0))
    simulate(create_strategy("fedavg", {}), model, population, Simulation(ROUNDS), lambda _: recorder)
    specs = [s for s in recorder.specs if s.origin == "global" and not s.copy_of]
    whole = sum(s.size_bytes for s in specs)
    rows = []
    for gap in GAPS:
        for number in range(gap, len(recorder.versions)):
            old, new = recorder.versions[number - gap], recorder.versions[number]
            flat = [
                np.concatenate([v[s.name].reshape(-1) for s in specs if s.dtype == "float32"])
                for v in (old, new)
            ]
            row: dict[str, object] = {"dataset": name, "gap": gap, "version": number, "whole": whole}
            row |= lossless(*flat)
            for codec in ("fp16", "int8"):
                row[codec], row[f"{codec} error"] = coded(codec, old, new, specs)
            rows.append(row)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    ways = [n for n in rows[0] if n not in ("dataset", "gap", "version", "whole")]
    print("| versions apart |", " | ".join(ways), "|\n|---|" + "---:|" * len(ways))
    for gap in GAPS:
        found = [row for row in rows if row["gap"] == gap]
        means = {n: fmean(float(str(row[n])) for row in found) for n in ways}
        cells = [f"{v:.2%}" if "error" in n else f"{v / whole:.1%}" for n, v in means.items()]
        print(f"| {gap} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
