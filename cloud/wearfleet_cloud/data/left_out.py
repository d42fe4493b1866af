"""A data set without some of its activities, so that they are unknown to what is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.labels import UNLABELLED

from wearfleet_cloud.data.dataset import Dataset
from wearfleet_cloud.data.prepared import Prepared

__all__ = ["leave_out"]


def leave_out(prepared: Prepared, activities: Sequence[str]) -> Prepared:
    """The same data with fewer classes: windows of the activities are gone, the other classes keep their order.

    Args:
        prepared: the data set.
        activities: names among its ``label_names``; none leaves it as it is.

    Returns:
        The rest; the names that were left out become ``other_labels`` of its description.

    Raises:
        ConfigError: an unknown activity, or fewer than two are left.
    """
    dataset = prepared.dataset
    unknown = [name for name in activities if name not in dataset.label_names]
    if unknown:
        raise ConfigError(
            f"data set {dataset.name} has no activity {', '.join(unknown)}; it has: {', '.join(dataset.label_names)}"
        )
    if not activities:
        return prepared
    names = tuple(name for name in dataset.label_names if name not in activities)
    if len(names) < 2:
        raise ConfigError(
            f"at least two activities must be left to tell apart, got {', '.join(names) or 'none'}"
        )
    renumbered = np.array([names.index(n) if n in names else UNLABELLED for n in dataset.label_names])
    windows = prepared.windows
    kept = np.flatnonzero(renumbered[windows.activity] != UNLABELLED)
    fewer = replace(
        windows,
        **{
            column: getattr(windows, column)[kept]
            for column in windows.__dataclass_fields__
            if column != "activity"
        },
        activity=renumbered[windows.activity[kept]].astype(np.int64),
    )
    labels = np.append(renumbered, UNLABELLED)[np.asarray(prepared.labels)].astype(np.int16)
    return Prepared(_without(dataset, names, activities), fewer, prepared.entries, prepared.samples, labels)


def _without(dataset: Dataset, names: tuple[str, ...], activities: Sequence[str]) -> Dataset:
    others = tuple(name for name in dataset.label_names if name in activities)
    return replace(dataset, label_names=names, other_labels=(*others, *dataset.other_labels), views={})
