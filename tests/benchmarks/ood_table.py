"""One table of every algorithm on USC-HAD, from the CSV files of the benchmark, with what was published beside it.

Run, from the repository root:
``python tests/benchmarks/ood_table.py docs/results/ood/cnn.csv docs/results/ood/transformer.csv``. Accuracy in per cent
on the unseen people, the step kept by source validation; mean and population standard deviation over the seeds.
Published: the repository table of FIXED (specs/ood.md 5.2), 150 passes, one seed.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, pstdev

PUBLISHED = {
    "erm": (80.98, 57.75),
    "dann": (81.22, 57.88),
    "coral": (78.82, 58.93),
    "and-mask": (79.88, 55.32),
    "group-dro": (80.12, 55.51),
    "rsc": (81.88, 57.94),
    "mixup": (79.98, 64.14),
    "fixed": (85.10, 69.19),
}


def main() -> None:
    accuracies: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    speeds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    backbones: dict[str, str] = {}
    transductive: set[str] = set()
    for name in sys.argv[1:]:
        for row in csv.DictReader(Path(name).read_text().splitlines()):
            backbones.setdefault(row["backbone"], row["steps"])
            key = (row["backbone"], row["method"])
            accuracies[*key, row["target"]].append(100.0 * float(row["source_validation_target_accuracy"]))
            speeds[key].append(float(row["steps_per_second"]))
            if row["transductive"] == "True":
                transductive.add(row["method"])
    targets = sorted({target for _, _, target in accuracies})
    methods = list(dict.fromkeys(method for _, method, _ in accuracies))
    heads = [f"{b}, {steps} steps: target {t}" for b, steps in backbones.items() for t in targets]
    print("| algorithm |", " | ".join([*heads, "published: target 0", "target 1"]), "|")
    print("|---|" + "---:|" * (len(heads) + 2))
    for method in methods:
        cells = [method + (" (transductive)" if method in transductive else "")]
        for backbone in backbones:
            for target in targets:
                found = accuracies[backbone, method, target]
                erm = fmean(accuracies[backbone, "erm", target])
                mean = fmean(found)
                sign = "" if method == "erm" else f" ({mean - erm:+.1f})"
                cells.append(f"{mean:.1f} ± {pstdev(found):.1f}{sign}")
        cells += [f"{value:.1f}" for value in PUBLISHED.get(method, ())] or ["-", "-"]
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
