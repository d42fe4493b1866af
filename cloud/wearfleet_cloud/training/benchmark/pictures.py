"""All pictures of a finished benchmark."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.data.dataset import Progress, silent
from wearfleet_cloud.training.benchmark.execution import Place, planned
from wearfleet_cloud.training.benchmark.figures import draw_critical_difference, draw_ranks
from wearfleet_cloud.training.benchmark.grid import Cell
from wearfleet_cloud.training.benchmark.protocol import choose
from wearfleet_cloud.training.benchmark.rows import Row
from wearfleet_cloud.training.benchmark.run_figures import Projection, draw_confusion, draw_features
from wearfleet_cloud.training.benchmark.statistics import compare
from wearfleet_cloud.training.benchmark.tables import settings_of, trials_of
from wearfleet_cloud.training.selection import RULES, SOURCE_VALIDATION

__all__ = ["chosen_cells", "draw_comparisons", "draw_runs"]


def draw_comparisons(rows: Sequence[Row], out: Path) -> list[Path]:
    """Rank plot and critical-difference diagram for every selection rule.

    Args:
        rows: of the finished runs.
        out: folder of the pictures.

    Returns:
        The files; none when fewer than two methods have all targets, no diagram for fewer than three.
    """
    simulated = ", simulated data" if any(row["simulated"] == "True" for row in rows) else ""
    files = []
    for rule in RULES:
        comparison = compare(rows, rule)
        if len(comparison.methods) < 2:
            continue
        title = f"Accuracy on the unseen domain, selection by {rule}{simulated}"
        files.append(out / f"ranks-{rule}.png")
        draw_ranks(comparison, title, files[-1])
        if len(comparison.methods) >= 3 and len(comparison.blocks) >= 2:
            files.append(out / f"critical-difference-{rule}.png")
            draw_critical_difference(comparison, title, files[-1])
    return files


def draw_runs(
    finished: Mapping[Cell, Row],
    place: Place,
    methods: Sequence[str],
    projection: Projection,
    progress: Progress = silent,
) -> list[Path]:
    """Confusions and features of the runs of some methods that source validation chose, first seed, every target.

    Args:
        finished: the rows of a benchmark.
        place: of the benchmark.
        methods: as in the grid.
        projection: "pca" or "tsne".
        progress: called with ("pictures", drawn, all).

    Returns:
        The files.

    Raises:
        ConfigError: a method that is not in the benchmark.
    """
    known = dict.fromkeys(cell.method for cell in finished)
    for method in methods:
        if method not in known:
            raise ConfigError(f"no method {method!r} in this benchmark to draw; it has: {', '.join(known)}")
    cells = [cell for cell in chosen_cells(finished) if cell.method in methods]
    files = []
    for number, cell in enumerate(cells):
        folder = place.folder(cell)
        files += [place.out / f"{kind}-{cell.id}.png" for kind in ("confusion", "features")]
        draw_confusion(folder, files[-2])
        draw_features(planned(cell, place), folder, projection, files[-1])
        progress("pictures", number + 1, len(cells))
    return files


def chosen_cells(finished: Mapping[Cell, Row]) -> list[Cell]:
    """The run of the first seed of the configuration that source validation chose, for every method and target."""
    rows = list(finished.values())
    found = []
    for setting in settings_of(rows):
        chosen = choose(trials_of(rows, setting, SOURCE_VALIDATION), setting.seeds)
        found += [
            cell
            for cell in finished
            if (cell.dataset, cell.scenario, cell.backbone)
            == (setting.dataset, setting.scenario, setting.backbone)
            and cell.seed == setting.seeds[0]
            and (cell.method, cell.target) in chosen
            and chosen[cell.method, cell.target].configuration == cell.configuration
        ]
    return found
