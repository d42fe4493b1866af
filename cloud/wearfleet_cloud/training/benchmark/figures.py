"""Pictures of a whole benchmark: ranks of the methods, and which of them differ."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wearfleet_cloud.training.benchmark.statistics import (
    Comparison,
    cliques,
    critical_difference,
    friedman_p,
    ranks,
)

__all__ = ["draw_critical_difference", "draw_ranks"]

_INK, _SOFT, _MARK = "#16202a", "#9aa8b5", "#0072b2"


def draw_ranks(comparison: Comparison, title: str, file: Path) -> None:
    """One line a method: its rank on every block as a dot, its mean rank as a diamond; the best on top."""
    found = ranks(comparison.accuracy)
    order = np.argsort(-found.mean(axis=0))
    figure = Figure(figsize=(8.0, 1.2 + 0.38 * len(order)), layout="constrained")
    axes = figure.subplots()
    generator = np.random.default_rng(0)  # dots of equal rank lie beside each other
    for line, method in enumerate(order):
        spread = line + generator.uniform(-0.18, 0.18, len(found))
        axes.plot(found[:, method], spread, "o", color=_SOFT, markersize=4, zorder=1)
        axes.plot(found[:, method].mean(), line, "D", color=_MARK, markersize=8, zorder=2)
    axes.set_yticks(range(len(order)), [comparison.methods[method] for method in order])
    axes.set_xlim(0.5, len(order) + 0.5)
    axes.set_xlabel(
        f"rank on each of {len(comparison.blocks)} targets (1 is the best), mean rank as a diamond"
    )
    _finish(figure, axes, title, file)


def draw_critical_difference(comparison: Comparison, title: str, file: Path) -> None:
    """Methods on a line of mean ranks; bars join those whose ranks do not differ at the 5 per cent level."""
    blocks, methods = comparison.accuracy.shape
    mean = ranks(comparison.accuracy).mean(axis=0)
    order = np.argsort(mean)
    difference = critical_difference(methods, blocks)
    figure = Figure(figsize=(8.0, 2.2 + 0.3 * methods), layout="constrained")
    axes = figure.subplots()
    bars = cliques(mean.tolist(), difference)
    for height, (first, last) in enumerate(bars):
        low, high = mean[order[first]] - 0.04, mean[order[last]] + 0.04
        axes.plot([low, high], [-0.4 - 0.35 * height] * 2, color=_INK, linewidth=4, solid_capstyle="butt")
    below = -0.4 - 0.35 * len(bars)
    for place, method in enumerate(order):
        left = place < (methods + 1) // 2
        level = below - 0.6 * (place + 1 if left else methods - place)
        edge = 1.0 - 0.2 if left else methods + 0.2
        axes.plot([mean[method], mean[method], edge], [0.0, level, level], color=_SOFT, linewidth=1.2)
        text = f"{comparison.methods[method]}  {mean[method]:.2f}"
        axes.text(
            edge, level, f"{text} " if left else f" {text}", ha="right" if left else "left", va="center"
        )
    axes.plot([1, methods], [0, 0], color=_INK)
    for rank in range(1, methods + 1):
        axes.plot([rank, rank], [0, 0.2], color=_INK)
        axes.text(rank, 0.3, str(rank), ha="center", va="bottom")
    axes.plot([1, 1 + difference], [1.6, 1.6], color=_MARK, linewidth=3)
    axes.text(1, 1.75, f"critical difference {difference:.2f}", va="bottom", color=_MARK)
    axes.set_xlim(1 - 0.35 * methods, 1.35 * methods)
    axes.set_ylim(below - 0.6 * ((methods + 1) // 2) - 0.4, 3.0)
    axes.set_axis_off()
    p = friedman_p(comparison.accuracy)
    _finish(figure, axes, f"{title}\nFriedman p = {p:.3g}, {blocks} targets, Nemenyi at 5 per cent", file)


def _finish(figure: Figure, axes: Axes, title: str, file: Path) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=150, metadata={"Software": ""})
