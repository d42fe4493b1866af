"""The domains that a data set can be divided into: persons, positions, data sets, times, devices.

Every function returns disjoint parts of the windows. One that the data do not allow raises ``DataError`` with the
reason. Windows of different domains never share a sample.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import DataError

from wearfleet_cloud.data.dataset import UNKNOWN_SUBJECT
from wearfleet_cloud.data.prepared import Prepared
from wearfleet_cloud.data.splits import sharing_samples, streams_in_time

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DIVISIONS", "Part", "person_groups"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One domain: its name and (n,) int64 positions of its windows, ascending."""

    name: str
    index: NDArray[np.int64]


def person_groups(prepared: Prepared) -> tuple[tuple[str, ...], ...]:
    """The persons of each domain that are present in the data; everybody is in exactly one group.

    Raises:
        DataError: wearers are unknown, so there are no persons to group.
    """
    _refuse_unknown_wearers(prepared)
    dataset, present = prepared.dataset, prepared.windows.subjects()
    if not dataset.domain_groups:
        size = dataset.group_size
        return tuple(present[first : first + size] for first in range(0, len(present), size))
    groups = [tuple(s for s in group if s in present) for group in dataset.domain_groups]
    outside = tuple(s for s in present if not any(s in group for group in groups))
    return tuple(group for group in (*groups, outside) if group)


def _by_person(prepared: Prepared) -> tuple[Part, ...]:
    groups = person_groups(prepared)
    if len(groups) < 2:
        raise DataError(
            f"all {len(prepared.windows.subjects())} persons are in one group; lower group_size in its description"
        )
    return tuple(Part(f"persons {'+'.join(g)}", prepared.windows.of_subjects(g)) for g in groups)


def _by_position(prepared: Prepared) -> tuple[Part, ...]:
    return _by_value(prepared.windows.position, "position on the body")


def _by_device(prepared: Prepared) -> tuple[Part, ...]:
    return _by_value(prepared.windows.device, "kind of device")


def _by_value(column: NDArray[np.str_], what: str) -> tuple[Part, ...]:
    """One domain a value, in the order in which the recordings bring them."""
    names, first, which = np.unique(column, return_index=True, return_inverse=True)
    if len(names) < 2:
        raise DataError(f"every recording has the same {what} ({names[0]}); at least two are needed")
    return tuple(Part(str(names[k]), np.flatnonzero(which == k)) for k in np.argsort(first))


def _by_member(prepared: Prepared) -> tuple[Part, ...]:
    """The members that have windows; the others are named in a warning."""
    if not prepared.dataset.members:
        raise DataError("it is one data set; use a joined one, such as har-common")
    subject = prepared.windows.subject
    parts = tuple(
        Part(name, np.flatnonzero(np.char.startswith(subject, f"{name}/")))
        for name in prepared.dataset.members
    )
    there = tuple(part for part in parts if len(part.index))
    if len(there) < 2:
        raise DataError(
            f"windows of at least two of its members are needed, found: {', '.join(p.name for p in there) or 'none'}"
        )
    if len(there) < len(parts):
        names, missing = (
            ", ".join(p.name for p in parts if bool(len(p.index)) is has) for has in (True, False)
        )
        _log.warning("%s without %s: its domains are %s", prepared.dataset.name, missing, names)
    return there


def _by_time(prepared: Prepared) -> tuple[Part, ...]:
    """Cut the time of every person, position, device and activity into equal parts, the first part into domain 0.

    Of windows on both sides of a cut that share samples, the earlier are left out.

    Source: specs/ood.md 1.3, scenario 4 (number of domains as of person groups).
    Differs: the benchmark's arrays come divided, how is not published; here each activity of a person is divided
        on its own, so that every domain holds all activities.
    """
    _refuse_unknown_wearers(prepared)
    windows, number = prepared.windows, prepared.dataset.time_domains
    every = np.arange(len(windows))
    domain = np.full(len(windows), -1, np.int64)
    for order in streams_in_time(windows, every):
        domain[order] = np.arange(len(order)) * number // len(order)
    for earlier in range(number - 1):
        own = np.flatnonzero(domain == earlier)
        domain[own[sharing_samples(windows, own, np.flatnonzero(domain > earlier))]] = -1
    parts = tuple(Part(f"time {k + 1} of {number}", np.flatnonzero(domain == k)) for k in range(number))
    if any(len(part.index) == 0 for part in parts):
        raise DataError(f"its recordings are too short to be cut into {number} times without shared samples")
    return parts


def _refuse_unknown_wearers(prepared: Prepared) -> None:
    if UNKNOWN_SUBJECT in prepared.windows.subjects():
        raise DataError(
            f"{prepared.dataset.name} as found here does not say who wore the sensor, so persons and their days cannot "
            "be told apart; use the official distribution with its subject files, or another data set such as hapt"
        )


DIVISIONS: Final[Mapping[str, Callable[[Prepared], tuple[Part, ...]]]] = {
    "cross-person": _by_person,
    "cross-position": _by_position,
    "cross-dataset": _by_member,
    "cross-time": _by_time,
    "cross-device": _by_device,
}
"""Scenario -> the domains of a data set for it."""
