"""The benchmark HAROOD's own training step, from a checkout outside this repository, as something to compare with.

Nothing of it is changed but ``Tensor.cuda``, which its algorithms call and which stays on the CPU here. Get it with
``git clone https://github.com/AIFrontierLab/HAROOD`` (measured: commit 3c2ce00e).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from wearfleet_cloud.training.loop import Resident

__all__ = ["ALGORITHMS", "harood_loop"]

ALGORITHMS = {"erm": "ERM", "coral": "CORAL", "mmd": "MMD"}
"""Our name -> its name."""


class _Domain(Dataset):  # type: ignore[type-arg]
    """One source domain as its data sets give it: window (C, 1, T), class, domain."""

    def __init__(self, x: Tensor, y: Tensor, domain: int) -> None:
        self._x, self._y, self._domain = x.unsqueeze(2).contiguous(), y.numpy(), domain

    def __len__(self) -> int:
        return len(self._y)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        return self._x[index], self._y[index], self._domain


def harood_loop(root: Path, name: str, windows: Resident, *, loader: bool) -> Callable[[int], None]:
    """Its loop for one of its algorithms.

    Args:
        root: of its checkout.
        name: a key of :data:`ALGORITHMS`.
        windows: of the source domains.
        loader: True for its data loaders (one worker process a domain), False for batches drawn before the clock runs.

    Returns:
        A function that makes so many steps.
    """
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign,assignment]
    kind = getattr(import_module(f"alg.algs.{ALGORITHMS[name]}"), ALGORITHMS[name])
    settings = Namespace(
        algorithm=ALGORITHMS[name],
        model_size="medium",
        task="cross_people",
        dataset="har",
        classifier="linear",
        num_classes=6,
        input_shape=(6, 1, 128),
        mmd_gamma=1.0,
        lr=1e-3,
        lr_decay1=1.0,
        lr_decay2=1.0,
        beta1=0.9,
        weight_decay=5e-4,
        schuse=False,
    )
    torch.manual_seed(0)
    algorithm = kind(settings).train()
    optimiser = import_module("alg.opt").get_optimizer(algorithm, settings)
    batches = _batches(windows, loader=loader)

    def run(steps: int) -> None:
        for _ in range(steps):
            algorithm.update([data for data in next(batches)], optimiser, None)  # noqa: C416 - as it does

    return run


def _batches(windows: Resident, *, loader: bool) -> Iterator[Any]:
    domains = []
    for number, (first, size) in enumerate(zip(windows.first.tolist(), windows.sizes, strict=True)):
        part = slice(first, first + size)
        domains.append(_Domain(windows.windows(part).contiguous(), windows.y[part], number))
    make = import_module("datautil.mydataloader").InfiniteDataLoader
    endless = zip(
        *(make(d, weights=None, batch_size=32, num_workers=int(loader)) for d in domains), strict=True
    )
    if loader:
        return endless
    drawn = [next(endless) for _ in range(64)]
    return (drawn[step % 64] for step in iter(int, 1))  # 0, 0, 0, ... for ever
