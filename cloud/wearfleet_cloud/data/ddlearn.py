"""The data of DDLearn's tables: DSADS, USC-HAD and PAMAP2 cut and grouped as that paper does.

Use them with the split rules ``ddlearn-100`` ... ``ddlearn-20`` (percent of the training windows that are kept) and
scenario seeds 1, 2, 3; the scenario tests on the 20 % test part of the target only. Results are not comparable with
those of the plain sets.

Source: Qin et al. 2023, arXiv:2306.04641, as told by specs/ood.md 3.5 and 5.4.
Differs: lost values of PAMAP2 are interpolated, not replaced by the mean of each window, because two windows that share
a sample would then disagree about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
from wearfleet_protos.labels import PAMAP2_12
from wearfleet_protos.recording import Recording

from wearfleet_cloud.data.dataset import Counts, Dataset, Progress, Reader
from wearfleet_cloud.data.dsads import DSADS
from wearfleet_cloud.data.file_reader import FileReader, count_recordings
from wearfleet_cloud.data.gaps import bridge, stretches
from wearfleet_cloud.data.layout import Source
from wearfleet_cloud.data.pamap2 import PAMAP2, PAMAP2_LAYOUT, Subject, subjects_of
from wearfleet_cloud.data.usc_had import USC_HAD

__all__ = ["DSADS_DDLEARN", "PAMAP2_DDLEARN", "USC_HAD_DDLEARN", "StrungTogether"]

_TESTED: Final = 0.2
_PAMAP2_LABELS: Final = (
    "lying",
    "sitting",
    "standing",
    "walking",
    "ascending stairs",
    "descending stairs",
    "vacuum cleaning",
    "ironing",
)
_PAMAP2_GROUPS: Final = (("101", "102"), ("103", "104"), ("105", "106"), ("107", "108"))


@dataclass(frozen=True, slots=True)
class StrungTogether:
    """Recordings of one person and activity that follow each other in a reader, as one (implements ``Reader``).

    Whether the signal goes on over a border is not asked: DSADS' stairs do not (see its module).

    Args:
        parts: reader of recordings with one label each.
    """

    parts: Reader

    def fingerprint(self, root: Path | None) -> str:
        """That of the parts."""
        return f"{self.parts.fingerprint(root)} strung together"

    def read(self, root: Path | None, progress: Progress) -> Iterator[Recording]:
        """One recording for each stretch of the same person and label."""
        recordings = self.parts.read(root, progress)
        for (_, label), group in groupby(recordings, key=lambda r: (r.subject, int(r.labels[0]))):
            own = tuple(group)
            yield replace(
                own[0],
                samples=np.concatenate([part.samples for part in own]),
                labels=np.concatenate([part.labels for part in own]),
                session=f"activity-{label + 1:02d}",
            )

    def counts(self, root: Path | None, progress: Progress) -> Counts:
        """Recordings, subjects and samples by label."""
        return count_recordings(self.read(root, progress))


def _runs(source: Source, progress: Progress) -> Iterator[Recording]:
    """One recording for each stretch of one of the eight activities of subjects 101 to 108, every gap bridged."""
    people = {person for group in _PAMAP2_GROUPS for person in group}
    for subject in subjects_of(source, progress):
        if subject.name in people:
            yield from _runs_of(subject)


def _runs_of(subject: Subject) -> Iterator[Recording]:
    samples = bridge(subject.samples, None)
    known = np.all(np.isfinite(samples), axis=1)
    found = []
    for piece in subject.pieces():
        for label, name in enumerate(_PAMAP2_LABELS):
            own = np.zeros(len(known), np.bool_)
            own[piece] = known[piece] & (subject.labels[piece] == PAMAP2_12.index(name))
            found += [(run.start, run.stop, label) for run in stretches(own)]
    for begin, end, label in sorted(found):
        yield Recording(
            samples=samples[begin:end].astype(np.float32),
            labels=np.full(end - begin, label, np.int16),
            rate_hz=PAMAP2.rate_hz,
            channels=PAMAP2.channels,
            subject=subject.name,
            position="whole body",
            device="colibri",
            session=f"{begin:08d}",
        )


def _variant(dataset: Dataset, reader: Reader, window: int, stride: int) -> Dataset:
    return replace(
        dataset,
        name=f"{dataset.name}-ddlearn",
        title=f"{dataset.title}, as in DDLearn's tables",
        window=window,
        stride=stride,
        reader=reader,
        views={},
        target_part=_TESTED,
        download=None,
        notes=f"fetch {dataset.name}; for the split rules ddlearn-20 to ddlearn-100; the test is a fifth of the target",
    )


DSADS_DDLEARN: Final = _variant(DSADS, StrungTogether(DSADS.reader), 125, 62)

USC_HAD_DDLEARN: Final = replace(
    _variant(USC_HAD, USC_HAD.reader, 500, 250),
    domain_groups=(
        ("01", "03", "10"),
        ("02", "05", "13"),
        ("04", "07", "09"),
        ("06", "08", "14"),
        ("11", "12"),
    ),
)

PAMAP2_DDLEARN: Final = replace(
    _variant(PAMAP2, FileReader(PAMAP2_LAYOUT, _runs), 512, 256),
    label_names=_PAMAP2_LABELS,
    domain_groups=_PAMAP2_GROUPS,
)
