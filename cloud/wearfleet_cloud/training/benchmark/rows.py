"""One row a run: the table ``runs.csv`` with everything that is needed to make each run again."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from wearfleet_protos.errors import IntegrityError

from wearfleet_cloud.training.benchmark.grid import Cell
from wearfleet_cloud.training.checkpoint import write_atomically
from wearfleet_cloud.training.selection import RULES
from wearfleet_cloud.training.trainer import RESULT_FILE

__all__ = ["COLUMNS", "FAILURE_FILE", "TIME_COLUMNS", "Row", "read_row", "trial_columns", "write_rows"]

Row = dict[str, str]
FAILURE_FILE = "failure.json"

_SCORES: Final = ("step", "score", "target_accuracy", "target_macro_f1")


def trial_columns(rule: str) -> dict[str, str]:
    """Names of the four columns of a selection rule: of step, score, target_accuracy, target_macro_f1."""
    return {name: f"{rule.replace('-', '_')}_{name}" for name in _SCORES}


TIME_COLUMNS: Final = ("train_seconds", "steps_per_second")
COLUMNS: Final = (
    "id",
    "dataset",
    "simulated",
    "scenario",
    "backbone",
    "method",
    "target",
    "target_name",
    "configuration",
    "seed",
    "error",
    *(column for rule in RULES for column in trial_columns(rule).values()),
    "kept_by",
    "mode",
    "transductive",
    "hyper",
    "options",
    "steps",
    "split",
    "standardise",
    "split_hash",
    "train_windows",
    "validation_windows",
    "leaking_windows",
    "target_windows",
    "device",
    "threads",
    "stacked",
    "commit",
    "torch",
    "numpy",
    "python",
    "command",
    *TIME_COLUMNS,
)
"""Of ``runs.csv``; the last ones depend on how fast the machine was."""


def read_row(cell: Cell, folder: Path) -> Row | None:
    """The row of a run, None when it is not finished.

    Args:
        cell: of the grid.
        folder: of the run.

    Raises:
        IntegrityError: its result is not one of this version.
    """
    result, failure = folder / RESULT_FILE, folder / FAILURE_FILE
    about = {
        "id": cell.id,
        "dataset": cell.dataset,
        "scenario": cell.scenario,
        "backbone": cell.backbone,
        "method": cell.method,
        "target": cell.target,
        "configuration": cell.configuration,
        "seed": cell.seed,
        "steps": cell.steps,
        "device": cell.device,
        "command": cell.command(),
    }
    try:
        if result.is_file():
            return _row({**about, **_results(json.loads(result.read_text()))})
        if failure.is_file():
            return _row({**about, **json.loads(failure.read_text())})
    except (KeyError, ValueError) as error:
        raise IntegrityError(
            f"{folder} does not hold a result of this version ({error!r}); delete it, or choose another --out"
        ) from error
    return None


def write_rows(rows: Sequence[Row], file: Path) -> None:
    """Write the table anew; whoever reads sees the old one or the new one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue().encode())


def _results(summary: Mapping[str, Any]) -> dict[str, object]:
    plain = (
        "simulated",
        "transductive",
        "split",
        "standardise",
        "split_hash",
        "train_windows",
        "validation_windows",
        "leaking_windows",
        "target_windows",
        "threads",
        "stacked",
        "commit",
        "torch",
        "numpy",
        "python",
        *TIME_COLUMNS,
    )
    scores: dict[str, object] = {}
    for rule, how in RULES.items():
        columns, kept = trial_columns(rule), summary["selections"][rule]
        values = {**kept, "score": kept[how.configuration_by]}
        scores |= {column: values[name] for name, column in columns.items()}
    return {
        **{name: summary[name] for name in plain},
        **scores,
        "target_name": summary["target"],
        "kept_by": summary["selection"],
        "mode": summary["options"].get("mode", ""),
        "hyper": json.dumps(summary["hyper"], sort_keys=True),
        "options": json.dumps(summary["options"], sort_keys=True),
    }


def _row(values: Mapping[str, object]) -> Row:
    return {column: str(values.get(column, "")) for column in COLUMNS}
