"""A reader of files: find the distribution by its layout, then parse it with two functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from wearfleet_protos.recording import Recording

from wearfleet_cloud.data.dataset import Counts, Progress
from wearfleet_cloud.data.layout import Layout, Source

__all__ = ["FileReader", "count_recordings"]


def count_recordings(recordings: Iterator[Recording]) -> Counts:
    """Numbers of recordings, subjects and samples, and of samples of each label (-1: none)."""
    number = samples = 0
    subjects: set[str] = set()
    labels: dict[str, int] = {}
    for recording in recordings:
        number += 1
        samples += len(recording.samples)
        subjects.add(recording.subject)
        for label, found in zip(*np.unique(recording.labels, return_counts=True), strict=True):
            labels[str(label)] = labels.get(str(label), 0) + int(found)
    return {
        "recordings": number,
        "subjects": len(subjects),
        "samples": samples,
        "samples_by_label": dict(sorted(labels.items())),
    }


@dataclass(frozen=True, slots=True)
class FileReader:
    """Reads a distribution from files (implements :class:`wearfleet_cloud.data.dataset.Reader`).

    Args:
        layout: how to find it.
        parse: yields the recordings of a distribution that was found.
        count: counts it; None counts the recordings.
    """

    layout: Layout
    parse: Callable[[Source, Progress], Iterator[Recording]]
    count: Callable[[Source, Progress], Counts] | None = None

    def fingerprint(self, root: Path | None) -> str:
        """Digest over names, sizes and modification times; DataError when nothing is found."""
        return self.layout.locate(root).fingerprint()

    def read(self, root: Path | None, progress: Progress) -> Iterator[Recording]:
        """Every recording; DataError when nothing is found or a file is not as documented."""
        return self.parse(self.layout.locate(root), progress)

    def counts(self, root: Path | None, progress: Progress) -> Counts:
        """What is there; DataError as for :meth:`read`."""
        source = self.layout.locate(root)
        if self.count is None:
            return count_recordings(self.parse(source, progress))
        return self.count(source, progress)
