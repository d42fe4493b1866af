"""Markdown table of demonstrations, from their ``summary.json``: the one in the README.

python tests/benchmarks/demo_table.py docs/results/demo-*.json
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def row(summary: dict) -> str:
    devices = summary["devices"]
    before, after = ([d[key] for d in devices] for key in ("accuracy_before", "accuracy_after"))
    people = ", ".join(f"{100 * b:.1f} → {100 * a:.1f}" for b, a in zip(before, after, strict=True))
    cells = (
        summary["dataset"] + (" (simulated)" if summary["simulated"] else ""),
        f"{len(summary['source_subjects'])} → {len(devices)}",
        (
            f"{100 * summary['central']['erm']['target_accuracy']:.1f} / "
            f"{100 * summary['central']['coral']['target_accuracy']:.1f}"
        ),
        f"**{100 * statistics.fmean(before):.1f} → {100 * statistics.fmean(after):.1f}**",
        people,
        (
            f"{sum(d['windows_ingested'] for d in devices):,} / {sum(d['windows_lost'] for d in devices)} / "
            f"{sum(d['windows_duplicated'] for d in devices)}"
        ),
        f"{max(d['rss_mb'] for d in devices):.0f}",
        f"{summary['seconds']['total']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    head = (
        "data", "people, trained on → devices", "ERM / CORAL on unseen, %", "mean before → after, %",
        "each person", "windows / lost / twice", "agent MB", "seconds",
    )  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for path in sys.argv[1:]:
        print(row(json.loads(Path(path).read_text())))


if __name__ == "__main__":
    main()
