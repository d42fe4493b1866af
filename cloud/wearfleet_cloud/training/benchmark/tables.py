"""Markdown tables of a benchmark: one a selection rule, data set, scenario and backbone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wearfleet_cloud.training.benchmark.protocol import Chosen, Spread, Trial, choose, overall, spread
from wearfleet_cloud.training.benchmark.rows import Row, trial_columns
from wearfleet_cloud.training.selection import RULES

__all__ = ["Setting", "markdown", "settings_of", "trials_of"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What one table is about: everything but methods and targets.

    Args:
        dataset, scenario, backbone: of the runs.
        simulated: True when no person was measured.
        methods: in the order of the grid.
        transductive: those of them that were scored with the target's windows at hand.
        targets: (number or name as given, name of the domain).
        seeds: of the grid.
    """

    dataset: str
    scenario: str
    backbone: str
    simulated: bool
    methods: tuple[str, ...]
    transductive: frozenset[str]
    targets: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]


def settings_of(rows: Sequence[Row]) -> list[Setting]:
    """The settings that occur in a benchmark, in its order."""
    keys = list(dict.fromkeys((r["dataset"], r["scenario"], r["backbone"]) for r in rows))
    found = []
    for key in keys:
        own = [row for row in rows if (row["dataset"], row["scenario"], row["backbone"]) == key]
        names = {row["target"]: row["target_name"] for row in own if row["target_name"]}
        found.append(
            Setting(
                *key,
                simulated=any(row["simulated"] == "True" for row in own),
                methods=tuple(dict.fromkeys(row["method"] for row in own)),
                transductive=frozenset(row["method"] for row in own if row["transductive"] == "True"),
                targets=tuple((t, names.get(t, t)) for t in dict.fromkeys(row["target"] for row in own)),
                seeds=tuple(dict.fromkeys(int(row["seed"]) for row in own)),
            )
        )
    return found


def trials_of(rows: Iterable[Row], setting: Setting, rule: str) -> list[Trial]:
    """The finished runs of a setting as a rule sees them."""
    columns = trial_columns(rule)
    key = (setting.dataset, setting.scenario, setting.backbone)
    return [
        Trial(
            method=row["method"],
            target=row["target"],
            configuration=int(row["configuration"]),
            seed=int(row["seed"]),
            score=float(row[columns["score"]]),
            accuracy=float(row[columns["target_accuracy"]]),
        )
        for row in rows
        if (row["dataset"], row["scenario"], row["backbone"]) == key and not row["error"]
    ]


def markdown(rows: Sequence[Row], rule: str) -> str:
    """The tables of one selection rule.

    Args:
        rows: of the finished runs, failed ones included.
        rule: a key of ``RULES``.
    """
    parts = [f"# Accuracy on the unseen domain, selection by {rule}", _explanation(rule)]
    for setting in settings_of(rows):
        name = f"{setting.dataset} (simulated)" if setting.simulated else setting.dataset
        parts.append(f"## {name}, {setting.scenario}, {setting.backbone}")
        chosen = choose(trials_of(rows, setting, rule), setting.seeds)
        parts.append(_table(setting, chosen))
    failed = [row for row in rows if row["error"]]
    if failed:
        parts.append("## Runs that failed")
        parts.append(
            "\n".join(f"- {row['method']}, target {row['target']}: {row['error']}" for row in failed)
        )
    return "\n\n".join(parts) + "\n"


def _explanation(rule: str) -> str:
    how = RULES[rule]
    step, configuration = (name.replace("_", " ") for name in (how.step_by, how.configuration_by))
    labels = " **Uses target labels: an upper bound, not a result.**" if "target" in configuration else ""
    return (
        f"Per cent, mean ± population standard deviation over the seeds. The step of a run is kept by its {step}, "
        f"the configuration for each target by its mean {configuration}.{labels}"
    )


def _table(setting: Setting, chosen: dict[tuple[str, str], Chosen]) -> str:
    head = ["method", *(name for _, name in setting.targets), "mean"]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for method in setting.methods:
        own = [chosen.get((method, target)) for target, _ in setting.targets]
        cells = [_percent(spread(one.by_seed.values()) if one else None) for one in own]
        total = overall(chosen, method, [target for target, _ in setting.targets])
        name = f"{method} (transductive)" if method in setting.transductive else method
        lines.append(_line([name, *cells, _percent(total)]))
    return "\n".join([*lines, "", f"Seeds: {', '.join(map(str, setting.seeds))}."])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(value: Spread | None) -> str:
    return "-" if value is None else f"{100 * value.mean:.1f} ± {100 * value.deviation:.1f}"
