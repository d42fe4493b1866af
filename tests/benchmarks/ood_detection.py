"""How well four scores find windows that no training window is like: unseen activity, person and position.

Run: ``python tests/benchmarks/ood_detection.py [--datasets NAME ...]`` from the repository root.
Every model is made by ``wearfleet-cloud train`` and judged by ``wearfleet-cloud evaluate --ood``; both commands are in
its rows, one file a data set. Started again it makes what is missing, and prints the tables in Markdown.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import typer
from typer.testing import CliRunner
from wearfleet_cloud.cli import train as commands

ALGORITHMS = ("erm", "diversify")
SEEDS = (0, 1, 2)
CASES = (
    ("hapt", "cross-person", "0", "walking upstairs"),
    ("hapt", "cross-person", "1", "lying"),
    ("usc-had", "cross-person", "0", "jumping up"),
    ("usc-had", "cross-person", "1", "walking left"),
    *(("dsads", "cross-position", target, "") for target in ("torso", "right_arm")),
)
"""Data set, scenario, held-out domain, activity left out of training."""
METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95")

APP = typer.Typer()
commands.register(APP)

Row = dict[str, Any]


def call(command: list[str]) -> Row:
    """What a command of wearfleet-cloud prints with --json."""
    result = CliRunner().invoke(APP, command)
    if result.exit_code:
        raise SystemExit(f"{shlex.join(command)}: {result.output} {result.exception}")
    found: Row = json.loads(result.stdout)
    return found


def rows_of(case: tuple[str, ...], algorithm: str, seed: int, steps: int, root: Path, out: Path) -> list[Row]:
    """Train one model and judge every score on every set it allows."""
    dataset, scenario, target, left_out = case
    folder = out / "-".join([dataset, target, left_out.replace(" ", "-") or "all", algorithm, str(seed)])
    train = [
        "train",
        "--dataset",
        dataset,
        "--data-root",
        str(root),
        "--scenario",
        scenario,
        "--target",
        target,
    ]
    train += ["--algorithm", algorithm, "--steps", str(steps), "--seed", str(seed), "--out", str(folder)]
    train += ["--leave-out", left_out] if left_out else []
    judge = ["evaluate", "--dataset", dataset, "--data-root", str(root), "--run", str(folder), "--ood"]
    trained = call([*train, "--json"])
    both = "; ".join(f"wearfleet-cloud {shlex.join(command)}" for command in (train, judge))
    about = {"dataset": dataset, "target": target, "left_out": left_out, "algorithm": algorithm, "seed": seed}
    about |= {"accuracy": trained["target_accuracy"]}
    return [
        {**about, "unknown": unknown, "score": score, **values, "commands": both}
        for unknown, scores in call([*judge, "--json"]).items()
        for score, values in scores.items()
    ]


def print_tables(rows: list[Row]) -> None:
    """For every data set and kind of unknown: mean over held-out domains, deviation over seeds; whole seeds only."""
    wanted = {
        dataset: sum(case[0] == dataset for case in CASES) for dataset in {row["dataset"] for row in rows}
    }
    runs = {(r["dataset"], r["algorithm"], r["seed"], r["target"]) for r in rows}
    made = Counter(run[:3] for run in runs)
    rows = [r for r in rows if made[r["dataset"], r["algorithm"], r["seed"]] == wanted[r["dataset"]]]
    groups: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["dataset"], row["unknown"]].append(row)
    print(
        "| data set | unknown | algorithm (seeds) | score | AUROC | AUPR known | AUPR unknown | FPR at 95 % |"
    )
    print("|---|---|---|---|---:|---:|---:|---:|")
    for (dataset, unknown), group in groups.items():
        for algorithm, score in dict.fromkeys((row["algorithm"], row["score"]) for row in group):
            own = [row for row in group if (row["algorithm"], row["score"]) == (algorithm, score)]
            cells = [_over_seeds(own, metric) for metric in METRICS]
            seeds = len({row["seed"] for row in own})
            print("|", " | ".join([dataset, unknown, f"{algorithm} ({seeds})", score, *cells]), "|")
    print(
        "\n| data set | held out | left out | algorithm | accuracy | best AUROC, its score: activity | domain |"
    )
    print("|---|---|---|---|---:|---:|---:|")
    for key in dict.fromkeys(
        tuple(row[k] for k in ("dataset", "target", "left_out", "algorithm")) for row in rows
    ):
        own = [r for r in rows if tuple(r[k] for k in ("dataset", "target", "left_out", "algorithm")) == key]
        domain = [r for r in own if r["unknown"] != "unseen activity"]
        activity = [r for r in own if r["unknown"] == "unseen activity"]
        cells = [_over_seeds(own, "accuracy"), _best(activity), _best(domain)]
        print("|", " | ".join([*key[:2], key[2] or "-", key[3], *cells]), "|")


def _over_seeds(rows: list[Row], metric: str) -> str:
    each = [
        fmean(float(r[metric]) for r in rows if r["seed"] == s)
        for s in dict.fromkeys(r["seed"] for r in rows)
    ]
    return f"{fmean(each):.3f} ± {pstdev(each):.3f}"


def _best(rows: list[Row]) -> str:
    if not rows:
        return "-"
    scores = {
        s: fmean(float(r["auroc"]) for r in rows if r["score"] == s) for s in {r["score"] for r in rows}
    }
    best = max(scores, key=scores.__getitem__)
    return f"{scores[best]:.3f} {best}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = list(dict.fromkeys(case[0] for case in CASES))
    parser.add_argument("--datasets", nargs="*", choices=known, default=known)
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/ood-detection"), help="folder of the runs")
    parser.add_argument("--csv", type=Path, default=Path("docs/results/ood"), help="folder of the rows")
    parser.add_argument("--steps", type=int, default=3000)
    given = parser.parse_args()
    rows: list[Row] = []
    for dataset in given.datasets:
        rows += complete(dataset, given.csv / f"detection-{dataset}.csv", given)
    print_tables(rows)


def complete(dataset: str, file: Path, given: argparse.Namespace) -> list[Row]:
    """All rows of a data set, those that were made before from the file."""
    rows: list[Row] = list(csv.DictReader(file.open())) if file.exists() else []
    made = {(r["dataset"], r["target"], r["left_out"], r["algorithm"], r["seed"]) for r in rows}
    for seed, case, algorithm in product(SEEDS, CASES, ALGORITHMS):
        if case[0] != dataset or (case[0], *case[2:], algorithm, str(seed)) in made:
            continue
        found = rows_of(case, algorithm, seed, given.steps, given.data_root, given.out)
        rows += [{name: _text(value) for name, value in row.items()} for row in found]
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return rows


def _text(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
