"""Every federated strategy on real people and on skewed labels, over seeds; the rounds are simulated.

Run, from the repository root, with ``WEARFLEET_DATA_ROOT`` set:
``python tests/benchmarks/federated_table.py run docs/results/federated`` (``--part people|label-skew|frozen`` for one
of its three tables) makes ``wearfleet-cloud simulate`` once a row; a run that is in ``runs.csv`` is not made again.
``python tests/benchmarks/federated_table.py table docs/results/federated`` prints the tables.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

DATASET, SEEDS = "hapt", (0, 1, 2)
LOCAL = {"epochs": "2", "learning_rate": "0.05", "batch_size": "32"}
COMMON = (
    "local",
    "fedavg",
    "fedprox",
    "fedbn",
    "fedper",
    "fedrep",
    "ditto",
    "perfedavg",
    "fednova",
    "scaffold",
    "fedavgm",
    "fedadagrad",
    "fedadam",
    "fedyogi",
    "fedap",
    "fedbuff",
    "metafed",
)
EXTRA = {
    "metafed": {"warm_rounds": "5", "laps": "1"},
    "fedbuff": {"buffer_size": "10", "concurrency": "30"},
}
FROZEN = {
    "local": {},
    "fedavg": {},
    "fedclip": {"target": "class_soft"},
    "fedclip identity": {"target": "identity"},
    "zoopfl": {"estimator": "random"},
}
"""Six people whom the network's training has not seen."""


def rounds_of(strategy: str, clients: int) -> int:
    return 5 + clients if strategy == "metafed" else 30


def rows(part: str, folder: Path) -> list[list[str]]:
    """The commands of a part, without the seed."""
    made = []
    if part == "frozen":
        for name, own in FROZEN.items():
            options = {**LOCAL, "learning_rate": "0.01", **own}
            made.append(
                [
                    *_command(name.split()[0], options, 30),
                    "--clients",
                    "6",
                    "--run",
                    str(folder / "unseen-run"),
                ]
            )
        return made
    clients = 30 if part == "people" else 20
    split = [] if part == "people" else ["--split", "label-skew", "--clients", "20", "--alpha", "0.1"]
    for name in COMMON:
        options = {**LOCAL, **EXTRA.get(name, {})}
        made.append([*_command(name, options, rounds_of(name, clients)), *split])
    return made


def _command(strategy: str, options: dict[str, str], rounds: int) -> list[str]:
    sets = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    tuned = ["--finetune", "2"] if strategy == "fedavg" else []
    return ["--strategy", strategy, "--dataset", DATASET, "--rounds", str(rounds), *sets, *tuned]


def run(part: str, folder: Path) -> None:
    if part == "frozen" and not (folder / "unseen-run" / "result.json").is_file():
        arguments = [
            "--dataset",
            DATASET,
            "--scenario",
            "cross-person",
            "--target",
            "0",
            "--algorithm",
            "erm",
        ]
        _wearfleet("train", *arguments, "--steps", "600", "--out", str(folder / "unseen-run"))
    done = {(r["part"], r["command"]) for r in _read(folder / "runs.csv")}
    for seed in SEEDS:
        for command in rows(part, folder):
            words = [*command, "--seed", str(seed)]
            text = " ".join(words).replace(str(folder), "OUT")
            if (part, text) not in done:
                _wearfleet("simulate", *words, "--out", str(folder / part / "simulations"))
                latest = _newest(folder / part / "simulations" / "runs.csv", command[1], seed)
                _append(folder / "runs.csv", {"part": part, "command": text, **latest})
                print(part, command[1], seed, latest["personal@clients mean"], flush=True)


def _wearfleet(*words: str) -> None:
    subprocess.run(
        [str(Path(sys.executable).parent / "wearfleet-cloud"), *words, "--json"], check=True, stdout=-3
    )


def _newest(file: Path, strategy: str, seed: int) -> dict[str, str]:
    return [r for r in _read(file) if (r["strategy"], r["seed"]) == (strategy, str(seed))][-1]


def _read(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _append(file: Path, row: dict[str, str]) -> None:
    known = [*_read(file), row]
    columns = list(dict.fromkeys(name for r in known for name in r))
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(known)


def table(folder: Path) -> None:
    parts: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in _read(folder / "runs.csv"):
        target = " identity" if "target=identity" in row["command"] else ""
        parts[row["part"]][row["strategy"] + target].append(row)
    for part, strategies in parts.items():
        print(
            f"\n### {part}\n\n| strategy | personal@clients, % | worst tenth, % | global@clients, % | MB up | seeds |"
        )
        print("|---|---:|---:|---:|---:|---:|")
        ordered = sorted(strategies.items(), key=lambda item: -_mean(item[1], "personal@clients mean"))
        for strategy, found in ordered:
            cells = [_spread(found, f"{mode} {figure}") for mode, figure in _SHOWN]
            megabytes = _mean(found, "bytes_up") / 1e6
            print(f"| {strategy} | {' | '.join(cells)} | {megabytes:.1f} | {len(found)} |")
        tuned = [row for row in strategies["fedavg"] if row.get("finetuned(2) mean")]
        print(f"\nFedAvg, then two local epochs: {_spread(tuned, 'finetuned(2) mean')}")


_SHOWN = (("personal@clients", "mean"), ("personal@clients", "worst"), ("global@clients", "mean"))


def _mean(found: list[dict[str, str]], column: str) -> float:
    return fmean(float(row[column]) for row in found)


def _spread(found: list[dict[str, str]], column: str) -> str:
    values = [100 * float(row[column]) for row in found]
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{fmean(values):.1f}"


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "table":
        table(where)
    else:
        for chosen in [sys.argv[4]] if len(sys.argv) > 4 else ["people", "label-skew", "frozen"]:
            run(chosen, where)
