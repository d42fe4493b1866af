"""Forward passes over all training windows in evaluation mode, for ``Algorithm.refresh``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from wearfleet_cloud.algorithms.base import TrainingWindows

__all__ = ["over_all_windows"]

_CHUNK: Final = 1024


def over_all_windows(
    data: TrainingWindows, forward: Callable[[Tensor], Tensor], *modules: nn.Module
) -> Tensor:
    """What a function of windows gives for every training window, without gradients.

    Args:
        data: all training windows.
        forward: from raw windows (n, C, T) to (n, ...).
        modules: that are in evaluation mode meanwhile; their mode is restored.

    Returns:
        (N, ...).
    """
    with torch.no_grad(), _evaluating(modules):
        starts = range(0, data.y.shape[0], _CHUNK)
        return torch.cat([forward(data.windows(slice(first, first + _CHUNK))) for first in starts])


@contextmanager
def _evaluating(modules: tuple[nn.Module, ...]) -> Iterator[None]:
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
