"""Scenarios: which windows are the source domains and which the unseen target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import ConfigError, DataError, NotFoundError

from wearfleet_cloud.data.dataset import UNKNOWN_SUBJECT
from wearfleet_cloud.data.prepared import Prepared
from wearfleet_cloud.data.splits import SPLITS, leakage_check

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Domain", "Scenario", "SourceSplit", "cross_person", "person_groups", "split_sources"]

_FRACTION: Final = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """Windows that belong together: ``x`` (N, C, T) float32, ``y`` (N,) int64, ``index`` (N,) into the prepared set."""

    name: str
    subjects: tuple[str, ...]
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, slots=True, eq=False)
class Scenario:
    """Source domains to train on and one target domain to test on; ``seed`` drives the splits made of it."""

    name: str
    prepared: Prepared
    sources: tuple[Domain, ...]
    target: Domain
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class SourceSplit:
    """Training and validation part of each source domain, in the same order.

    ``leaking`` counts training windows that share samples with validation (stratified rule only).
    """

    train: tuple[Domain, ...]
    validation: tuple[Domain, ...]
    leaking: int


def person_groups(prepared: Prepared) -> tuple[tuple[str, ...], ...]:
    """The persons of each domain that are present in the data; everybody is in exactly one group.

    Raises:
        DataError: wearers are unknown, so there are no persons to group.
    """
    dataset, present = prepared.dataset, prepared.windows.subjects()
    if UNKNOWN_SUBJECT in present:
        raise DataError(
            f"data set {dataset.name} as found here does not say who wore the sensor, so persons cannot be told apart; "
            "use the official distribution with its subject files, or another data set such as hapt"
        )
    if not dataset.domain_groups:
        size = dataset.group_size
        return tuple(present[first : first + size] for first in range(0, len(present), size))
    groups = [tuple(s for s in group if s in present) for group in dataset.domain_groups]
    outside = tuple(s for s in present if not any(s in group for group in groups))
    return tuple(group for group in (*groups, outside) if group)


def cross_person(prepared: Prepared, target: int | tuple[str, ...], seed: int = 0) -> Scenario:
    """Train on some people, test on others.

    Args:
        prepared: the data set.
        target: number of the person group to hold out (specs/ood.md 1.2 where it defines groups), or the subjects.
        seed: of the splits made of the scenario.

    Returns:
        One source domain a remaining group, without the held-out subjects.

    Raises:
        DataError: wearers are unknown, or nobody is left to train on.
        ConfigError: no such group.
        NotFoundError: no such subject.
    """
    groups = person_groups(prepared)
    if isinstance(target, int):
        if not 0 <= target < len(groups):
            raise ConfigError(
                f"data set {prepared.dataset.name} has person groups 0 to {len(groups) - 1}, got target {target}"
            )
        held = groups[target]
    else:
        held = target
    unknown = sorted(set(held) - set(prepared.windows.subjects()))
    if unknown or not held:
        raise NotFoundError(
            f"data set {prepared.dataset.name} has no windows of subjects {unknown}; "
            f"known: {', '.join(prepared.windows.subjects())}"
        )
    rest = [tuple(s for s in group if s not in held) for group in groups]
    sources = tuple(_domain(prepared, f"persons {'+'.join(group)}", group) for group in rest if group)
    if not sources:
        raise DataError(f"all persons of {prepared.dataset.name} are held out; leave some to train on")
    goal = _domain(prepared, f"persons {'+'.join(held)}", held)
    leakage_check(
        prepared.windows, np.concatenate([d.index for d in sources]), goal.index, persons_apart=True
    )
    return Scenario("cross-person", prepared, sources, goal, seed)


def split_sources(scenario: Scenario, rule: str = "block", fraction: float = _FRACTION) -> SourceSplit:
    """Split every source domain into training and validation, and check that nothing leaks.

    Args:
        scenario: what to split; its seed drives the rule.
        rule: a name of :data:`wearfleet_cloud.data.splits.SPLITS`.
        fraction: share for validation.

    Raises:
        ConfigError: unknown rule, or a fraction outside (0, 1).
        DataError: by-person with domains of one person, or leakage (which only ``stratified`` tolerates and counts).
    """
    if rule not in SPLITS:
        raise ConfigError(f"unknown split rule {rule!r}; known: {', '.join(SPLITS)}")
    windows = scenario.prepared.windows
    splits = [SPLITS[rule](windows, domain.index, fraction, scenario.seed) for domain in scenario.sources]
    if rule != "stratified":
        train = np.concatenate([split.train for split in splits])
        validation = np.concatenate([split.validation for split in splits])
        leakage_check(windows, train, validation, persons_apart=rule == "person")
    pairs = list(zip(scenario.sources, splits, strict=True))
    return SourceSplit(
        train=tuple(_part(domain, split.train) for domain, split in pairs),
        validation=tuple(_part(domain, split.validation) for domain, split in pairs),
        leaking=sum(split.leaking for split in splits),
    )


def _domain(prepared: Prepared, name: str, subjects: tuple[str, ...]) -> Domain:
    index = prepared.windows.of_subjects(subjects)
    x = np.asarray(prepared.windows.x[index])
    return Domain(name, subjects, x, prepared.windows.activity[index], index)


def _part(domain: Domain, index: NDArray[np.int64]) -> Domain:
    own = np.searchsorted(domain.index, index)  # both ascending
    return Domain(domain.name, domain.subjects, domain.x[own], domain.y[own], index)
