"""Accuracy of every robust rule under simulated attackers, on the people of a data set.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/federated_attacks.py --data-root DIR --out runs.csv [--part 0/2]``,
then ``python tests/benchmarks/federated_attacks.py --table runs.csv ...``, from the repository root. A row that is in
the file is not run again. The first ``CLIENTS`` people by name take part, the others are never seen. FedAvg with the
rule; each rule is told the true number of attackers, without an attack two.

For speed clients are measured between rounds on a ninth of their held-out windows; the accuracies at the end are of the
global model on all of them.
"""

import argparse
import csv
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from wearfleet_cloud.cli.simulate import _model
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import Prepared, default_cache_dir, prepare
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Arrays
from wearfleet_cloud.federated.attacks import Attackers, chosen_attackers
from wearfleet_cloud.federated.robust.options import RULES
from wearfleet_cloud.federated.simulate import Outcome, Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient, people
from wearfleet_cloud.federated.stacked_clients import StackedClients
from wearfleet_models.classifier import Classifier
from wearfleet_protos.errors import AggregationError

CLIENTS: Final = 20
ROUNDS: Final = 20
SEEDS: Final = (0, 1, 2)
TRAINING: Final = {"batch_size": 16, "max_steps": 2, "learning_rate": 0.1, "momentum": 0.9}
COLUMNS: Final = (
    "dataset", "rule", "options", "attack", "attackers", "clients", "rounds", "seed", "global", "worst", "unseen",
    "skipped", "refused", "suspected_attackers", "suspected_honest", "note", "seconds",
)  # fmt: skip
CASES: Final = (
    ("none", 0.0),
    ("sign-flip", 0.3),
    ("scaled", 0.3),
    ("label-flip", 0.3),
    ("sign-flip", 0.1),
    ("scaled", 0.1),
    ("label-flip", 0.1),
    ("inflated", 0.3),
    ("replay", 0.3),
    ("nan", 0.3),
    ("inflated", 0.1),
    ("replay", 0.1),
    ("nan", 0.1),
)
"""Attack and share, the most telling first."""


def options_of(rule: str, share: float) -> dict[str, object]:
    """What an operator who knows the number of attackers chooses."""
    attackers = int((share or 0.1) * CLIENTS)
    told: Mapping[str, dict[str, object]] = {
        "mean": {},
        "trimmed-mean": {"attackers": attackers, "trim": 0.4 if share > 0.2 else 0.2},
    }
    return {"rule": rule, **told.get(rule, {"attackers": attackers})}


def thinned(client: SimulatedClient) -> SimulatedClient:
    """With a ninth of its held-out windows."""
    return replace(client, holdout=client.holdout.select(np.arange(0, len(client.holdout), 9)))


def accuracies(model: Classifier, tensors: Arrays, clients: Sequence[SimulatedClient]) -> list[float]:
    """Of the global tensors, for each client on its held-out windows."""
    values = {name: torch.from_numpy(np.array(tensors[name])) for name in model.state_dict()}
    found = []
    with torch.no_grad():
        for client in clients:
            x = torch.from_numpy(np.array(client.holdout.x))
            said = torch.func.functional_call(model.eval(), values, (x,)).argmax(dim=1).numpy()
            found.append(float((said == client.holdout.y).mean()))
    return found


def run(
    prepared: Prepared, everyone: Sequence[SimulatedClient], rule: str, attack: str, share: float, seed: int
) -> dict[str, object]:
    """One row."""
    seen, unseen = everyone[:CLIENTS], everyone[CLIENTS:]
    options = options_of(rule, share)
    strategy = create_strategy("fedavg", {**TRAINING, **options})
    model = _model(prepared, Population(seen), "cnn", seed)
    bad = chosen_attackers([c.name for c in seen], share, seed)
    begin = time.monotonic()
    row: dict[str, object] = {
        "dataset": prepared.dataset.name, "rule": rule,
        "options": " ".join(f"{k}={v}" for k, v in options.items() if k != "rule"),
        "attack": attack, "attackers": len(bad), "clients": len(seen), "rounds": ROUNDS, "seed": seed,
    }  # fmt: skip
    try:
        outcome = simulate(
            strategy,
            model,
            Population([thinned(c) for c in seen]),
            Simulation(ROUNDS, seed=seed),
            lambda s: Attackers(StackedClients(s, model, seed), attack, bad, model.spec.classes),
        )
    except AggregationError as error:
        return {**row, "note": str(error), "seconds": round(time.monotonic() - begin, 1)}
    return {
        **row,
        **figures(outcome, model, seen, unseen, bad),
        "seconds": round(time.monotonic() - begin, 1),
    }


def figures(
    outcome: Outcome,
    model: Classifier,
    seen: Sequence[SimulatedClient],
    unseen: Sequence[SimulatedClient],
    bad: frozenset[str],
) -> dict[str, object]:
    """Accuracies, and per round how many clients the rule pointed at, rightly and wrongly."""
    own = sorted(accuracies(model, outcome.tensors, seen))
    pointed = [set(r.suspects) for r in outcome.rounds]
    return {
        "global": round(statistics.mean(own), 5),
        "worst": round(statistics.mean(own[: max(1, len(own) // 10)]), 5),
        "unseen": round(statistics.mean(accuracies(model, outcome.tensors, unseen)), 5),
        "skipped": sum(bool(r.skipped) for r in outcome.rounds),
        "refused": round(statistics.mean(len(r.refused) for r in outcome.rounds), 2),
        "suspected_attackers": round(statistics.mean(len(p & bad) for p in pointed), 2),
        "suspected_honest": round(statistics.mean(len(p - bad) for p in pointed), 2),
    }


def wanted() -> Iterator[tuple[int, str, float, str]]:
    """All runs, so that an unfinished table has whole seeds first."""
    for seed, (attack, share), rule in itertools.product(SEEDS, CASES, RULES):
        yield seed, attack, share, rule


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Mean and range over the seeds of the mean accuracy over clients, in per cent; a line an attack."""
    lines = [["attack", *RULES], ["---"] * (1 + len(RULES))]
    for attack, share in sorted(CASES, key=lambda case: (case[0] != "none", case)):
        number = str(int(share * CLIENTS))
        own = [r for r in rows if (r["attack"], r["attackers"]) == (attack, number)]
        cells = [cell([r for r in own if r["rule"] == rule]) for rule in RULES]
        lines.append([f"{attack}, {number}" if share else "none", *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cell(rows: Sequence[Mapping[str, str]]) -> str:
    """Of one rule under one attack; a star for each seed that is missing."""
    scores = [100 * float(r["global"]) for r in rows if r.get("global")]
    if not scores:
        return "skipped" if rows else "-"
    missing = "*" * (len(SEEDS) - len(scores))
    return f"{statistics.mean(scores):.1f} ({min(scores):.0f}-{max(scores):.0f}){missing}"


def read(file: Path) -> list[dict[str, str]]:
    """Rows of a file; none if it is not there."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--dataset", default="hapt")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run from the i-th")
    parser.add_argument("--table", type=Path, nargs="+")
    given = parser.parse_args()
    if given.table:
        print(table([row for file in given.table for row in read(file)]))
        return
    torch.set_num_threads(1)
    prepared = prepare(dataset_named(given.dataset), given.data_root, default_cache_dir())
    everyone = people(prepared)
    part, parts = map(int, given.part.split("/"))
    done = {(int(r["seed"]), r["attack"], int(r["attackers"]), r["rule"]) for r in read(given.out)}
    with given.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if not done:
            writer.writeheader()
        for seed, attack, share, rule in itertools.islice(wanted(), part, None, parts):
            if (seed, attack, int(share * CLIENTS), rule) not in done:
                row = run(prepared, everyone, rule, attack, share, seed)
                writer.writerow(row)
                file.flush()
                print(row, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
