"""How much of a run's score is lag of the running statistics of batch normalisation.

Run: ``python tests/benchmarks/settled_statistics.py RUN... [--data-root DIR]`` from the repository root.

For every run folder of ``wearfleet-cloud train``: accuracy on the held-out source windows (all together) and on the
target as the run left the model, and again after one pass of 3000 of its training windows, drawn with seed 0, has set
every running mean and variance anew. The weights stay as they are. A large step up says that the weights moved faster
than the statistics could follow: inputs with an offset that is large beside their deviation, at a large learning rate.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import default_cache_dir, prepare
from wearfleet_cloud.export.run_folder import read_run, scenario_of_run, windows_of_run
from wearfleet_models import Classifier
from wearfleet_models.layers import BatchNorm

WINDOWS = 3000


@torch.no_grad()
def accuracy(model: Classifier, x: Tensor, y: Tensor) -> float:
    """Percent of windows (N, C, T) whose class is the one of y (N,)."""
    right = sum(
        int((model(x[i : i + 1024]).argmax(1) == y[i : i + 1024]).sum()) for i in range(0, len(x), 1024)
    )
    return 100.0 * right / len(x)


@torch.no_grad()
def settle(model: Classifier, x: Tensor) -> None:
    """Give every batch normalisation the statistics of the windows (N, C, T), layer after layer in one pass."""
    layers = [module for module in model.modules() if isinstance(module, BatchNorm)]
    shares = {}
    for layer in layers:
        shares[layer] = (layer.running_mean.clone(), layer.running_var.clone())
        layer.train()
    model(x)
    for layer, (mean, variance) in shares.items():
        rate = layer.momentum or 0.0
        layer.running_mean = (layer.running_mean - (1.0 - rate) * mean) / rate
        layer.running_var = (layer.running_var - (1.0 - rate) * variance) / rate
        layer.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    options = parser.parse_args()
    sys.stdout.write("run  validation  target  validation, settled  target, settled\n")
    for folder in options.runs:
        run = read_run(folder)
        prepared = prepare(
            dataset_named(run.dataset).for_scenario(run.scenario), options.data_root, options.cache_dir
        )
        windows, target = windows_of_run(run, prepared), scenario_of_run(run, prepared).target
        held_out = (torch.from_numpy(windows.x_validation), torch.from_numpy(windows.y_validation))
        unseen = (torch.from_numpy(target.x), torch.from_numpy(target.y))
        before = [accuracy(run.model, *pair) for pair in (held_out, unseen)]
        chosen = np.random.default_rng(0).permutation(len(windows.x))[:WINDOWS]
        settle(run.model, torch.from_numpy(windows.x[chosen]))
        after = [accuracy(run.model, *pair) for pair in (held_out, unseen)]
        sys.stdout.write(f"{folder}  " + "  ".join(f"{value:.1f}" for value in (*before, *after)) + "\n")


if __name__ == "__main__":
    main()
