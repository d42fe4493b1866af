"""What simulations leave in their folder: one CSV row a run, a Markdown table, the rounds, and a picture of them."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from wearfleet_cloud.federated.simulate import Outcome

__all__ = ["KEY", "row_of", "write_report"]

KEY: Final = (
    "strategy",
    "options",
    "dataset",
    "split",
    "protocol",
    "clients",
    "unseen",
    "rounds",
    "cohort",
    "latency",
    "seed",
    "begins_with",
    "wire",
)
"""What makes a run another one; a run that is made again replaces its row."""

_MODE_FIGURES: Final = ("mean", "weighted", "worst", "deviation")


def row_of(about: Mapping[str, object], outcome: Outcome, seconds: float) -> dict[str, object]:
    """A run as one flat row.

    Args:
        about: the columns of ``KEY`` and ``simulated``.
        outcome: of the run.
        seconds: of its rounds and evaluation.

    Returns:
        ``about``, then accuracies as ``<mode> <figure>``, bytes of the payload of all rounds, virtual and real
        seconds.
    """
    modes = {
        f"{mode} {figure}": round(float(getattr(values, figure)), 5)
        for mode, values in outcome.modes.items()
        for figure in _MODE_FIGURES
    }
    down, up = (sum(getattr(r, name) for r in outcome.rounds) for name in ("bytes_down", "bytes_up"))
    virtual_s = round(outcome.rounds[-1].virtual_s, 2)
    return {
        **about,
        **modes,
        "bytes_down": down,
        "bytes_up": up,
        "virtual_s": virtual_s,
        "seconds": round(seconds, 2),
    }


def write_report(folder: Path, row: Mapping[str, object], outcome: Outcome) -> None:
    """Add a run to ``runs.csv`` and ``table.md``, and write its rounds and their picture beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [r for r in _read(folder / "runs.csv") if any(r.get(k, "") != str(row[k]) for k in KEY)]
    rows.append({name: str(value) for name, value in row.items()})
    columns = list(dict.fromkeys(name for r in rows for name in r))
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "table.md").write_text(_markdown(rows), encoding="utf-8")
    name = f"{row['strategy']}-{row['dataset']}-{row['split']}-seed{row['seed']}".replace("/", "_")
    lines = [json.dumps(asdict(r)) for r in outcome.rounds]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _draw(folder / f"{name}.png", name + (" (simulated data)" if row["simulated"] else ""), outcome)


def _read(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Mean accuracy over clients by mode, in per cent, and the worst tenth in brackets."""
    modes = list(dict.fromkeys(n.removesuffix(" mean") for r in rows for n in r if n.endswith(" mean")))
    shown = ("strategy", "options", "dataset", "split", "protocol", "clients", "rounds", "seed")
    head = [*shown, *modes, "MB up"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        name = row["dataset"] + (" (simulated)" if row.get("simulated") == "True" else "")
        cells = [row.get(k, "") if k != "dataset" else name for k in shown]
        for mode in modes:
            mean, worst = row.get(f"{mode} mean"), row.get(f"{mode} worst")
            cells.append(f"{100 * float(mean):.2f} ({100 * float(worst):.2f})" if mean and worst else "-")
        lines.append([*cells, f"{int(row['bytes_up']) / 1e6:.2f}"])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"Accuracy in per cent, mean over clients (worst tenth of them).\n\n{table}\n"


def _draw(file: Path, title: str, outcome: Outcome) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  slow to import

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    known = [(r.number, 100 * r.received) for r in outcome.rounds if r.received is not None]
    axes.plot([number for number, _ in known], [share for _, share in known])
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy of what clients received, %")
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(file, dpi=120)
