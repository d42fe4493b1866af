"""Every federated strategy on real people and on skewed labels, over seeds; the rounds are simulated.

Run, from the repository root, with ``WEARFLEET_DATA_ROOT`` set:
``python tests/benchmarks/federated_table.py run docs/results/federated`` (``--part NAME`` for one of its tables:
people, label-skew, unseen, trained-skew, dsads, usc-had) makes ``wearfleet-cloud simulate`` once a row; a run that is
in ``runs.csv`` is not made again. ``python tests/benchmarks/federated_table.py table docs/results/federated`` prints
the tables, and ``… splits docs/results/federated`` writes the hash of every split into ``splits.csv`` (``simulate``
says it too).
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import default_cache_dir, prepare
from wearfleet_cloud.federated.simulated_clients import SimulatedClient, label_skew, people, split_hash

SEEDS = (0, 1, 2)
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
NETWORKS = {"cnn": ["--steps", "600"], "transformer": ["--steps", "600", "--set", "feedforward=256"]}
UNSEEN = (
    ("cnn", "local", {}),
    ("cnn", "fedavg", {}),
    ("cnn", "fedap", {"weight_source": "pretrained", "reference": "cnn"}),
    ("cnn", "fedhealth2", {"reference": "cnn"}),
    ("cnn", "fedclip", {"target": "class_soft"}),
    ("cnn", "fedclip", {"target": "identity"}),
    ("cnn", "zoopfl", {"estimator": "random"}),
    ("transformer", "local", {}),
    ("transformer", "fedavg", {}),
    ("transformer", "epfl", {"rank": "4"}),
)
"""The network that runs of ``unseen`` and ``trained-skew`` begin with, strategy and options; its training has seen all
people but the first six."""


@dataclass(frozen=True)
class Part:
    """One table: its data, clients, rounds and local training."""

    dataset: str
    clients: int
    rounds: int
    epochs: int
    rate: float
    split: tuple[str, ...] = ()

    def command(self, strategy: str, options: dict[str, str]) -> list[str]:
        """The words of a run, without its seed."""
        rounds = 5 + self.clients if strategy == "metafed" else self.rounds
        given = {"epochs": str(self.epochs), "learning_rate": str(self.rate), "batch_size": "32", **options}
        sets = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
        tuned = ["--finetune", "2"] if strategy == "fedavg" else []
        words = ["--strategy", strategy, "--dataset", self.dataset, "--rounds", str(rounds), *sets, *tuned]
        return [*words, *self.split]


_TRAINED = ("unseen", "trained-skew")
SKEW = ("--split", "label-skew", "--clients", "20", "--alpha", "0.1")
PARTS = {
    "people": Part("hapt", 30, 30, 2, 0.05),
    "label-skew": Part("hapt", 20, 30, 2, 0.05, SKEW),
    "unseen": Part("hapt", 6, 30, 2, 0.01, ("--clients", "6")),
    "trained-skew": Part("hapt", 20, 10, 1, 0.01, SKEW),
    "dsads": Part("dsads", 8, 30, 2, 0.05),
    "usc-had": Part("usc-had", 14, 15, 1, 0.05),
}


def rows(part: str, folder: Path) -> list[list[str]]:
    """The commands of a part, without the seed."""
    if part not in _TRAINED:
        return [PARTS[part].command(name, dict(EXTRA.get(name, {}))) for name in COMMON]
    made = []
    for network, strategy, own in UNSEEN:
        options = {name: str(_network(folder, v)) if name == "reference" else v for name, v in own.items()}
        made.append([*PARTS[part].command(strategy, options), "--run", str(_network(folder, network))])
    return made


def _network(folder: Path, name: str) -> Path:
    return folder / f"unseen-{name}"


def run(part: str, folder: Path) -> None:
    if part in _TRAINED:
        for name, options in NETWORKS.items():
            if not (_network(folder, name) / "result.json").is_file():
                target = ["--dataset", "hapt", "--scenario", "cross-person", "--target", "0"]
                words = [*target, "--algorithm", "erm", "--backbone", name, *options]
                _wearfleet("train", *words, "--out", str(_network(folder, name)))
    done = {(r["part"], r["command"]) for r in _read(folder / "runs.csv")}
    for seed in SEEDS:
        for command in rows(part, folder):
            words = [*command, "--seed", str(seed)]
            text = " ".join(words).replace(str(folder), "OUT")
            if (part, text) not in done:
                _wearfleet("simulate", *words, "--out", str(folder / part / "simulations"))
                latest = _newest(folder / part / "simulations" / "runs.csv", command[1], seed)
                latest["options"] = latest["options"].replace(str(folder), "OUT")
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
        parts[row["part"]][_label(row)].append(row)
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
        for name, found in strategies.items():
            if found[0].get("finetuned(2) mean"):
                print(f"\n{name}, then two local epochs: {_spread(found, 'finetuned(2) mean')}")


def _label(row: dict[str, str]) -> str:
    """The strategy, with what tells two rows of it apart."""
    words = row["command"].split()
    own = " identity" if "target=identity" in words else ""
    started = words[words.index("--run") + 1].rpartition("unseen-")[2] if "--run" in words else ""
    return row["strategy"] + own + (f", {started}" if started else "")


def splits(folder: Path) -> None:
    """One row a split: what is needed to make it, and its hash."""
    made = []
    for name in ("hapt", "dsads", "usc-had"):
        data = prepare(dataset_named(name), Path(os.environ["WEARFLEET_DATA_ROOT"]), default_cache_dir())
        made.append(_split_row(name, "people", "", people(data)))
        for alpha in (0.1, 0.01):
            for seed in SEEDS:
                clients = label_skew(data.windows.x, data.windows.activity, 20, alpha, seed)
                made.append(_split_row(name, f"label-skew({alpha})", str(seed), clients))
    with (folder / "splits.csv").open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(made[0]))
        writer.writeheader()
        writer.writerows(made)


def _split_row(dataset: str, split: str, seed: str, clients: tuple[SimulatedClient, ...]) -> dict[str, str]:
    learned, held = (
        sum(len(p) for p in part) for part in zip(*((c.train, c.holdout) for c in clients), strict=True)
    )
    return {
        "dataset": dataset,
        "split": split,
        "seed": seed,
        "clients": str(len(clients)),
        "train windows": str(learned),
        "holdout windows": str(held),
        "split_hash": split_hash(clients),
    }


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
    elif what == "splits":
        splits(where)
    else:
        for chosen in [sys.argv[4]] if len(sys.argv) > 4 else list(PARTS):
            run(chosen, where)
