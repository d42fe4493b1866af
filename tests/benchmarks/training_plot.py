"""A picture of ``bench_training.py``: single runs beside the reference, and runs that advance together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench_report import Row
from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(rows: Sequence[Row], machine: str, file: Path) -> None:
    """Write the picture.

    Args:
        rows: of the benchmark.
        machine: that was measured.
        file: to write.
    """
    rates = [row for row in rows if row.metric == "throughput"]
    single = [row for row in rates if not row.case.startswith("stack")]
    stacks = [row for row in rates if row.provider.startswith("stack of")]
    figure = Figure(figsize=(11.0, 0.8 + 0.3 * max(len(single), 10)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for line, row in enumerate(reversed(single)):
        ours = row.provider == "ours"
        left.barh(line, row.median, color="#0072b2" if ours else "#9aa8b5")
        left.plot([row.p20, row.p80], [line, line], color="#16202a")
        left.text(row.p80, line, f"  {row.median:.0f}", va="center", fontsize=8)
    names = [f"{row.case}: {row.provider}" for row in reversed(single)]
    left.set_yticks(range(len(single)), names, fontsize=8)
    left.set_xlabel("steps a second (median; 20 to 80 per cent)")
    if stacks:
        runs = [int(row.provider.rpartition(" ")[2]) for row in stacks]
        right.plot(runs, [row.median for row in stacks], "o-", color="#0072b2", label="stacked")
        alone = [row.median for row in rates if row.provider == "one by one"]
        right.axhline(sum(alone) / len(alone), color="#9aa8b5", label="one by one")
        right.set_xscale("log", base=2)
        highest = [row.median for row in stacks]
        if max(highest) > 10.0 * min(highest):
            right.set_yscale("log")
        else:
            right.set_ylim(0.0, 1.1 * max(*highest, *alone))
        right.set_xticks(runs, [str(count) for count in runs])
        right.set_xlabel("ERM runs that advance together")
        right.set_ylabel("steps a second of all runs")
        right.legend()
    figure.suptitle(f"4 domains x 32 windows of 6 x 128, CNN, Adam. {machine}", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130, metadata={"Software": ""})
