"""The scores of many runs at once: one network pass for all, counted on the device, read once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from wearfleet_cloud.algorithms.base import Tensors
from wearfleet_cloud.training.examination import mixed_pairs
from wearfleet_cloud.training.metrics import accuracy_of, macro_f1
from wearfleet_cloud.training.pool import Pool, table
from wearfleet_cloud.training.run import Run
from wearfleet_cloud.training.selection import Scores, mean_over_domains

__all__ = ["StackedExamination", "stacked_examination"]

_AT_ONCE: Final = 4096
"""Windows of all runs together in one pass."""


@dataclass(frozen=True, slots=True)
class StackedExamination:
    """Windows that R runs are scored on.

    Args:
        window: (R, M) int64 number in the pool: held-out windows domain after domain, then the target's.
        part: (R, M) int64 which of the D + 1 parts each belongs to, D + 1 for filling.
        first: (R, V) int64 first window of each mixture.
        second: (R, V) int64 second window.
        share: (R, V) float32 share of the first.
        real: (R, V) bool, False for filling.
        domains: D.
    """

    window: Tensor
    part: Tensor
    first: Tensor
    second: Tensor
    share: Tensor
    real: Tensor
    domains: int

    def scores(self, model: nn.Module, tensors: Tensors, pool: Pool, classes: int) -> list[Scores]:
        """The scores of every run.

        Args:
            model: its own tensors are not read; its mode is restored.
            tensors: named tensors of the networks, runs first.
            pool: the windows.
            classes: K.
        """
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                confusion = self._confusion(model, tensors, pool, classes).cpu()
                soft = self._soft_accuracy(model, tensors, pool).tolist()
        finally:
            model.train(training)
        return [
            Scores(
                source_validation_accuracy=mean_over_domains([accuracy_of(c) for c in own[: self.domains]]),
                mixup_validation_accuracy=soft[run],
                target_accuracy=accuracy_of(own[self.domains]),
                target_macro_f1=macro_f1(own[self.domains]),
            )
            for run, own in enumerate(confusion)
        ]

    def _confusion(self, model: nn.Module, tensors: Tensors, pool: Pool, classes: int) -> Tensor:
        """(R, D + 1, K, K) int64 confusion matrix of every part of every run."""
        runs, parts, cells = len(self.window), self.domains + 2, classes * classes
        found = _predicted(model, tensors, self.window, pool.windows)
        place = torch.arange(runs, device=found.device)[:, None] * parts + self.part
        number = place * cells + pool.y[self.window] * classes + found
        counts = torch.bincount(number.flatten(), minlength=runs * parts * cells)
        return counts.reshape(runs, parts, classes, classes)[:, :-1]

    def _soft_accuracy(self, model: nn.Module, tensors: Tensors, pool: Pool) -> Tensor:
        """(R,) float64 soft-label accuracy on the mixtures."""
        pairs = torch.stack([self.first, self.second], dim=-1)
        mixed = torch.cat([pairs.double(), self.share[..., None].double()], dim=-1)

        def windows(part: Tensor) -> Tensor:
            weight = part[..., 2, None, None].float()
            first, second = part[..., 0].long(), part[..., 1].long()
            return weight * pool.windows(first) + (1.0 - weight) * pool.windows(second)

        found = _predicted(model, tensors, mixed, windows)
        share = self.share.double()
        right = share * (found == pool.y[self.first]) + (1.0 - share) * (found == pool.y[self.second])
        return (right * self.real).sum(dim=1) / self.real.sum(dim=1)


def stacked_examination(runs: Sequence[Run], device: torch.device) -> StackedExamination:
    """What these runs of one data set are scored on."""
    windows, parts, firsts, seconds, shares = [], [], [], [], []
    for run in runs:
        held = [domain.index for domain in run.split.validation]
        sets = [*held, run.scenario.target.index]
        windows.append(np.concatenate(sets))
        parts.append(np.repeat(np.arange(len(sets)), [len(one) for one in sets]))
        pairs, all_held = mixed_pairs([len(one) for one in held], run.scenario.seed), np.concatenate(held)
        firsts.append(all_held[pairs.first])
        seconds.append(all_held[pairs.second])
        shares.append(pairs.share)
    window, real_window = table(windows)
    domains = len(runs[0].split.validation)
    first, real = table(firsts)
    share = torch.zeros(real.shape).masked_scatter(real, torch.from_numpy(np.concatenate(shares)))
    return StackedExamination(
        window=window.to(device),
        part=torch.where(real_window, table(parts)[0], domains + 1).to(device),
        first=first.to(device),
        second=table(seconds)[0].to(device),
        share=share.to(device),
        real=real.to(device),
        domains=domains,
    )


def _predicted(
    model: nn.Module, tensors: Tensors, given: Tensor, windows: Callable[[Tensor], Tensor]
) -> Tensor:
    """Predicted classes (R, M) int64 of what ``windows`` makes of (R, m, ...) parts of ``given`` (R, M, ...)."""

    def logits(own: Tensors, x: Tensor) -> Tensor:
        result: Tensor = functional_call(model, own, (x,))
        return result

    parts = torch.split(given, max(_AT_ONCE // len(given), 1), dim=1)
    return torch.cat([vmap(logits)(tensors, windows(part)).argmax(dim=-1) for part in parts], dim=1)
