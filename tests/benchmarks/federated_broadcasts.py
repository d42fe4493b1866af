"""Bytes that go down to devices, and the accuracy that it costs, with each down-link of federated averaging.

Run, from the repository root, with ``WEARFLEET_DATA_ROOT`` set:
``python tests/benchmarks/federated_broadcasts.py hapt docs/results/federated-broadcasts.csv``. Real data, simulated
rounds; all clients in each round, or 4 of 10 drawn for each, who then hold older versions. Then strategies with frozen
networks, without any option. Tables go to standard output, for ``docs/results/federated-codecs.md``. A run that is in
the CSV already is not made again.
"""

from __future__ import annotations

import csv
import os
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

import torch
from wearfleet_cloud.cli.simulate import _model
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import default_cache_dir, prepare
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.simulate import Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import people
from wearfleet_cloud.federated.stacked_clients import StackedClients

if TYPE_CHECKING:
    from wearfleet_cloud.data.prepared import Prepared

CLIENTS, ROUNDS, SEEDS, COHORTS = 10, 20, (0, 1, 2), (10, 4)
CASES: dict[str, dict[str, object]] = {
    "whole": {},
    "difference": {"downlink": "difference"},
    "fp16": {"downlink": "fp16"},
    "bf16": {"downlink": "bf16"},
    "int8": {"downlink": "int8"},
    "int4": {"downlink": "int4"},
    "topk 1 %": {"downlink": "topk"},
    "topk 10 %": {"downlink": "topk", "downlink_fraction": 0.1},
    "randk 10 %": {"downlink": "randk", "downlink_fraction": 0.1},
    "sign": {"downlink": "sign"},
    "int8, updates int8": {"downlink": "int8", "codec": "int8"},
    "topk 10 %, updates sign": {"downlink": "topk", "downlink_fraction": 0.1, "codec": "sign"},
}
FROZEN: dict[tuple[str, str], dict[str, object]] = {
    ("fedclip", "cnn"): {},
    ("fedclip", "transformer"): {},
    ("zoopfl", "cnn"): {"estimator": "random", "reconstruction_rounds": 1},
    ("epfl", "transformer"): {"rank": 4},
}
"""Strategy and network; their case is the network."""


def run(prepared: Prepared, name: str, case: str, seed: int, cohort: int) -> dict[str, object]:
    frozen = (name, case) in FROZEN
    strategy = create_strategy(name, FROZEN[name, case] if frozen else CASES[case])
    population = Population(people(prepared, CLIENTS))
    model = strategy.network(_model(prepared, population, case if frozen else "cnn", seed), seed)
    simulation = Simulation(5 if frozen else ROUNDS, CohortPolicy(0 if cohort == CLIENTS else cohort), seed)
    outcome = simulate(strategy, model, population, simulation, lambda s: StackedClients(s, model, seed))
    rounds = outcome.rounds
    return {
        "dataset": prepared.dataset.name,
        "strategy": name,
        "case": case,
        "seed": seed,
        "clients": CLIENTS,
        "cohort": cohort,
        "rounds": len(rounds),
        "global_mean": round(outcome.modes["global@clients"].mean, 5),
        "global_worst": round(outcome.modes["global@clients"].worst, 5),
        "received_round_10": "" if frozen else round(rounds[9].received or 0.0, 5),
        "bytes_down_first_round": rounds[0].bytes_down,
        "bytes_down_last_round": rounds[-1].bytes_down,
        "bytes_down": sum(r.bytes_down for r in rounds),
        "bytes_up": sum(r.bytes_up for r in rounds),
    }


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def shown(rows: list[dict[str, str]], name: str) -> str:
    values = [float(row[name]) for row in rows]
    return f"{100 * fmean(values):.1f} ± {100 * pstdev(values):.1f}"


def table(rows: list[dict[str, str]], cohort: int) -> str:
    found: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        if row["strategy"] == "fedavg" and int(row["cohort"]) == cohort:
            found[row["case"]].append(row)
    whole = fmean(int(row["bytes_down"]) for row in found["whole"])
    heads = f"down-link, {cohort} of {CLIENTS} a round", "bytes a client, last round", "down, all rounds"
    lines = ["| " + " | ".join([*heads, "accuracy", "worst client", "after 9 rounds"]) + " |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for case in (case for case in CASES if case in found):
        last = fmean(int(row["bytes_down_last_round"]) for row in found[case]) / cohort
        share = fmean(int(row["bytes_down"]) for row in found[case]) / whole
        accuracies = [shown(found[case], n) for n in ("global_mean", "global_worst", "received_round_10")]
        lines.append("| " + " | ".join([case, f"{last:,.0f}", f"{100 * share:.1f} %", *accuracies]) + " |")
    return "\n".join(lines)


def frozen_table(rows: list[dict[str, str]]) -> str:
    lines = ["| strategy, network | bytes a client, first round | later rounds |", "|---|---:|---:|"]
    for row in rows:
        if row["strategy"] != "fedavg":
            first, last = (int(row[f"bytes_down_{n}_round"]) // CLIENTS for n in ("first", "last"))
            lines.append(f"| {row['strategy']}, {row['case']} | {first:,} | {last:,} |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    name, file = sys.argv[1], Path(sys.argv[2])
    prepared = prepare(dataset_named(name), Path(os.environ["WEARFLEET_DATA_ROOT"]), default_cache_dir())
    wanted = [("fedavg", case, seed, cohort) for seed in SEEDS for cohort in COHORTS for case in CASES]
    for strategy, case, seed, cohort in [*((*key, 0, CLIENTS) for key in FROZEN), *wanted]:
        rows = rows_of(file)
        key = (name, strategy, case, str(seed), str(cohort))
        if any((r["dataset"], r["strategy"], r["case"], r["seed"], r["cohort"]) == key for r in rows):
            continue
        row = run(prepared, strategy, case, seed, cohort)
        with file.open("a", newline="") as out:
            writer = csv.DictWriter(out, list(row))
            if not rows:
                writer.writeheader()
            writer.writerow(row)
    rows = [row for row in rows_of(file) if row["dataset"] == name]
    print("\n\n".join([*(table(rows, cohort) for cohort in COHORTS), frozen_table(rows)]))


if __name__ == "__main__":
    main()
