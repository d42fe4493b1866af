"""Pictures of single runs: confusions, and the features of source and target windows in a plane."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA  # type: ignore[import-untyped]
from sklearn.manifold import TSNE  # type: ignore[import-untyped]
from wearfleet_models import Classifier

from wearfleet_cloud.training.model_files import load_model
from wearfleet_cloud.training.run import Run

__all__ = ["PROJECTIONS", "Projection", "draw_confusion", "draw_features", "plane"]

Projection = Literal["pca", "tsne"]
PROJECTIONS: Final[Mapping[str, Projection]] = {"pca": "pca", "tsne": "tsne"}
_WINDOWS: Final = 1200
"""Of sources and of the target, at most, in a picture of features."""


def draw_confusion(folder: Path, file: Path) -> None:
    """Recall of every activity on the unseen domain, from the result of a run."""
    summary = json.loads((folder / "result.json").read_text())
    counts = np.array(summary["target_confusion"], np.float64)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    labels = summary["labels"]
    size = 2.5 + 0.45 * len(labels)
    figure = Figure(figsize=(size + 1.0, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    for row, column in np.ndindex(*counts.shape):
        if counts[row, column]:
            tint = "white" if share[row, column] > 0.5 else "black"
            text = f"{100 * share[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=tint, fontsize=8)
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlabel("recognised as")
    axes.set_ylabel("annotated")
    simulated = ", simulated" if summary["simulated"] else ""
    about = f"{summary['algorithm']}, {summary['dataset']}{simulated}, {summary['target']}"
    axes.set_title(f"{about}\naccuracy {100 * summary['target_accuracy']:.1f} %", fontsize=10, loc="left")
    figure.savefig(file, dpi=150, metadata={"Software": ""})


def draw_features(run: Run, folder: Path, projection: Projection, file: Path) -> None:
    """Features of held-out source windows and of target windows, by activity and by domain.

    Args:
        run: whose windows.
        folder: of the trained model.
        projection: "pca" or "tsne".
        file: to write.
    """
    model = load_model(folder)
    generator = np.random.default_rng(0)
    sources = [(domain.x, domain.y) for domain in run.split.validation]
    domains = [*sources, (run.scenario.target.x, run.scenario.target.y)]
    names = [*(domain.name for domain in run.split.validation), f"target: {run.scenario.target.name}"]
    features, labels, origin = [], [], []
    for number, (x, y) in enumerate(domains):
        limit = _WINDOWS if number == len(sources) else max(_WINDOWS // len(sources), 1)
        chosen = np.sort(generator.permutation(len(y))[:limit])
        features.append(_features(model, x[chosen]))
        labels.append(y[chosen])
        origin.append(np.full(len(chosen), number))
    points = plane(np.concatenate(features), projection)
    figure = Figure(figsize=(11.0, 5.4), layout="constrained")
    panels = figure.subplots(1, 2)
    activities = run.scenario.prepared.dataset.label_names
    for axes, values, legend in (
        (panels[0], np.concatenate(labels), activities),
        (panels[1], np.concatenate(origin), names),
    ):
        colours = colormaps["tab10" if len(legend) <= 10 else "tab20"]
        for value, name in enumerate(legend):
            own = values == value
            axes.scatter(
                *points[own].T, s=6, label=name, color=[colours(value % colours.N)], alpha=0.6, linewidths=0
            )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(fontsize=7, markerscale=2.0, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3)
    panels[0].set_title("by activity", fontsize=10, loc="left")
    panels[1].set_title("by domain", fontsize=10, loc="left")
    dataset, name = run.scenario.prepared.dataset, {"pca": "PCA", "tsne": "t-SNE"}[projection]
    simulated = ", simulated" if dataset.simulated else ""
    figure.suptitle(f"{run.algorithm}, {dataset.name}{simulated}, features by {name}", fontsize=10)
    figure.savefig(file, dpi=150, metadata={"Software": ""})


def plane(features: NDArray[np.float32], projection: Projection) -> NDArray[np.float32]:
    """Points in a plane (N, 2) for features (N, F); seeded."""
    if projection == "pca" or len(features) < 4:
        found = PCA(2, random_state=0).fit_transform(features)
    else:
        perplexity = min(30.0, (len(features) - 1) / 3.0)
        found = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
    return np.asarray(found, np.float32)


def _features(model: Classifier, x: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.no_grad():
        parts = [model.features(torch.tensor(x[first : first + 512])) for first in range(0, len(x), 512)]
    return torch.cat(parts).numpy()
