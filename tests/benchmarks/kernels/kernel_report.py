"""Tables and plots from the CSV file of ``bench_kernels.py``.

    python tests/benchmarks/kernels/kernel_report.py FILE.csv --out docs/results/kernels

Writes ``README.md`` with a table for every operation and, where matplotlib is installed, ``<operation>.png``: time
against the competitors' by shape.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

_ORDER = ("naive", "eager", "compile", "ours")
_COLOURS = {"naive": "#b0b0b0", "eager": "#7c9ec9", "compile": "#d99a4e", "ours": "#2f7d5b"}
Rows = list[dict[str, str]]
Key = tuple[str, str, str]  # size, shape, dtype


def read(path: Path) -> dict[str, Rows]:
    """The rows of each operation."""
    found: dict[str, Rows] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["operation"]].append(row)
    return found


def by_shape(rows: Rows, part: str) -> dict[Key, dict[str, dict[str, str]]]:
    """Providers' rows of one part, by shape."""
    found: dict[Key, dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        if row["part"] == part:
            found[row["size"], row["shape"], row["dtype"]][row["provider"]] = row
    return found


def table(rows: Rows) -> list[str]:
    """Markdown: one line for each shape and part."""
    providers = [p for p in _ORDER if any(row["provider"] == p for row in rows)]
    others = [p for p in providers if p != "ours"]
    heads = ["shape", "dtype", "part", *(f"{p} us" for p in providers), *(f"{p} / ours" for p in others)]
    heads += ["peak MiB ours / eager", "share of ceiling", "error"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for part in ("forward", "backward", "both"):
        for (_, shape, dtype), found in by_shape(rows, part).items():
            if "ours" in found:
                cells = [shape, dtype, part, *_cells(found, providers, others)]
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cells(found: dict[str, dict[str, str]], providers: list[str], others: list[str]) -> list[str]:
    ours = found["ours"]
    times = {p: row["median_us"] for p, row in found.items()}
    cells = [f"{float(times[p]):.4g}" if times.get(p) else "wrong" if p in found else "-" for p in providers]
    for other in others:
        both = times.get(other) and times["ours"]
        cells.append(f"{float(times[other]) / float(times['ours']):.2f}" if both else "-")
    peaks = [found.get(p, {}).get("peak_mib") or "-" for p in ("ours", "eager")]
    share = ours["share_of_ceiling"]
    return [*cells, " / ".join(peaks), f"{float(share):.1%}" if share else "-", ours["error"]]


def plot(operation: str, rows: Rows, path: Path) -> None:
    """Bars of forward and backward together (forward where there is no backward), by shape; logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    part = "both" if any(row["part"] == "both" for row in rows) else "forward"
    shapes = by_shape(rows, part)
    providers = [p for p in _ORDER if any(p in found for found in shapes.values())]
    figure, axes = plt.subplots(figsize=(max(6.0, 0.9 * len(shapes)), 3.6), layout="constrained")
    for offset, provider in enumerate(providers):
        places, heights, errors = [], [], []
        for place, found in enumerate(shapes.values()):
            row = found.get(provider)
            if row and row["median_us"]:
                median, low, high = (float(row[name]) for name in ("median_us", "p20_us", "p80_us"))
                places.append(place + (offset - (len(providers) - 1) / 2) * 0.8 / len(providers))
                heights.append(median)
                errors.append((median - low, high - median))
        axes.bar(
            places, heights, 0.8 / len(providers), label=provider, color=_COLOURS[provider],
            yerr=list(zip(*errors, strict=True)) or None, error_kw={"linewidth": 0.8},
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), [f"{shape}\n{dtype}" for _, shape, dtype in shapes], fontsize=7)
    axes.set_ylabel(f"{part}, microseconds")
    axes.set_title(f"{operation} on {rows[0]['device']}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """As the first lines of this file say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    operations = read(options.csv)
    first = next(iter(operations.values()))[0]
    lines = [
        "# Kernels, measured",
        "",
        f"{first['device']}; {first['versions']}; commit {first['commit']}.",
        "",
    ]
    lines += ["Median microseconds; the 20th and 80th percentile and all else are in the CSV file.", ""]
    drawing = find_spec("matplotlib") is not None
    if not drawing:
        print("matplotlib is not installed: tables without plots")
    for name, rows in operations.items():
        lines += [f"## {name}", ""]
        if drawing:
            picture = options.out / f"{name.replace('/', '-')}.png"
            plot(name, rows, picture)
            lines += [f"![{name}]({picture.name})", ""]
        lines += [*table(rows), ""]
    (options.out / "README.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
