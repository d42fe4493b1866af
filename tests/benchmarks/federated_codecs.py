"""Bytes and accuracy of federated averaging with each codec of updates, over seeds; real data, simulated rounds.

Run, from the repository root, with ``WEARFLEET_DATA_ROOT`` set:
``python tests/benchmarks/federated_codecs.py hapt docs/results/federated-codecs.csv``. A table goes to standard output,
for ``docs/results/federated-codecs.md``. A run that is in the CSV already is not made again.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

import torch
from wearfleet_cloud.cli.simulate import _model
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import default_cache_dir, prepare
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.simulate import Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import people
from wearfleet_cloud.federated.stacked_clients import StackedClients

if TYPE_CHECKING:
    from wearfleet_cloud.data.prepared import Prepared

CLIENTS, ROUNDS, SEEDS = 10, 20, (0, 1, 2)
CASES: dict[str, dict[str, object]] = {
    "float32": {},
    "fp16": {"codec": "fp16"},
    "bf16": {"codec": "bf16"},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "topk 1 %": {"codec": "topk"},
    "topk 10 %": {"codec": "topk", "codec_fraction": 0.1},
    "randk 10 %": {"codec": "randk", "codec_fraction": 0.1},
    "sign": {"codec": "sign"},
    "powersgd rank 2": {"codec": "powersgd"},
    "powersgd rank 4": {"codec": "powersgd", "codec_rank": 4},
}


def run(prepared: Prepared, case: str, seed: int) -> dict[str, object]:
    strategy = create_strategy("fedavg", CASES[case])
    population = Population(people(prepared, CLIENTS))
    model = _model(prepared, population, "cnn", seed)
    begin = time.process_time()
    outcome = simulate(
        strategy, model, population, Simulation(ROUNDS, seed=seed), lambda s: StackedClients(s, model, seed)
    )
    ends = outcome.rounds[-1]
    return {
        "dataset": prepared.dataset.name,
        "case": case,
        "seed": seed,
        "clients": CLIENTS,
        "rounds": ROUNDS,
        "global_mean": round(outcome.modes["global@clients"].mean, 5),
        "global_worst": round(outcome.modes["global@clients"].worst, 5),
        "received_round_10": round(outcome.rounds[9].received or 0.0, 5),
        "bytes_up_first_round": outcome.rounds[0].bytes_up // CLIENTS,
        "bytes_up_last_round": ends.bytes_up // CLIENTS,
        "bytes_up": sum(r.bytes_up for r in outcome.rounds),
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def table(rows: list[dict[str, str]]) -> str:
    found: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        found[row["case"]].append(row)
    plain = fmean(int(row["bytes_up"]) for row in found["float32"])
    lines = [
        "| codec | bytes an update, last round | all rounds, of float32 | accuracy | worst client | after 9 rounds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in CASES:
        if case not in found:
            continue
        shown = [
            f"{100 * fmean(values):.1f} ± {100 * pstdev(values):.1f}"
            for values in (
                [float(row[name]) for row in found[case]]
                for name in ("global_mean", "global_worst", "received_round_10")
            )
        ]
        size = fmean(int(row["bytes_up_last_round"]) for row in found[case])
        share = fmean(int(row["bytes_up"]) for row in found[case]) / plain
        lines.append("| " + " | ".join([case, f"{size:,.0f}", f"{100 * share:.1f} %", *shown]) + " |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    name, file = sys.argv[1], Path(sys.argv[2])
    prepared = prepare(dataset_named(name), Path(os.environ["WEARFLEET_DATA_ROOT"]), default_cache_dir())
    for seed in SEEDS:
        for case in CASES:
            rows = rows_of(file)
            if any((r["dataset"], r["case"], r["seed"]) == (name, case, str(seed)) for r in rows):
                continue
            row = run(prepared, case, seed)
            with file.open("a", newline="") as out:
                writer = csv.DictWriter(out, list(row))
                if not rows:
                    writer.writeheader()
                writer.writerow(row)
    print(table([row for row in rows_of(file) if row["dataset"] == name]))


if __name__ == "__main__":
    main()
