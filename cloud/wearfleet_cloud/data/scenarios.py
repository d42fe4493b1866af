"""Scenarios: which windows are the source domains and which the unseen target.

Source: specs/ood.md 1.3. Persons are pooled in cross-position, cross-time and cross-device, as published: the target
shares people with the sources, and where several sensors measure at once also moments, but never a sample.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
from wearfleet_protos.errors import ConfigError, DataError, NotFoundError

from wearfleet_cloud.data.dataset import Dataset, Progress, silent
from wearfleet_cloud.data.domains import DIVISIONS, Part, person_groups
from wearfleet_cloud.data.left_out import leave_out
from wearfleet_cloud.data.prepared import Prepared, prepare
from wearfleet_cloud.data.splits import LEAKING_RULES, SPLITS, leakage_check
from wearfleet_cloud.data.three_way import three_way

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Domain",
    "Scenario",
    "SourceSplit",
    "build_scenario",
    "check_scenario_name",
    "cross_person",
    "open_scenario",
    "person_groups",
    "possible_scenarios",
    "split_sources",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_FRACTION: Final = 0.2
_PERSONS_APART: Final = ("cross-person", "cross-dataset")


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

    ``leaking`` counts training windows that share samples with validation (:data:`LEAKING_RULES` only).
    """

    train: tuple[Domain, ...]
    validation: tuple[Domain, ...]
    leaking: int


def open_scenario(
    dataset: Dataset,
    name: str,
    target: int | tuple[str, ...],
    *,
    seed: int,
    data_root: Path | None,
    cache_dir: Path,
    activities_left_out: Sequence[str] = (),
    progress: Progress = silent,
) -> Scenario:
    """Prepare a data set in the form that a scenario needs, and build the scenario.

    Args:
        dataset: which one.
        name: of the scenario, a key of :data:`wearfleet_cloud.data.domains.DIVISIONS`.
        target: as for :func:`build_scenario`.
        seed: of the splits made of the scenario.
        data_root: folder with the distributions; None only for simulated sets.
        cache_dir: of prepared data.
        activities_left_out: names of classes whose windows are taken out first.
        progress: told about reading and cutting.

    Raises:
        ConfigError: unknown scenario or no such domain.
        DataError: the distribution is missing or malformed, or the data cannot give the scenario.
        NotFoundError: no such subject or domain.
    """
    check_scenario_name(name)
    prepared = prepare(dataset.for_scenario(name), data_root, cache_dir, progress)
    return build_scenario(name, leave_out(prepared, activities_left_out), target, seed)


def build_scenario(name: str, prepared: Prepared, target: int | tuple[str, ...], seed: int = 0) -> Scenario:
    """Hold out one domain of a prepared data set; the others are the sources.

    Args:
        name: a key of :data:`wearfleet_cloud.data.domains.DIVISIONS`.
        prepared: from ``dataset.for_scenario(name)``.
        target: number of the domain to hold out, or its name in a tuple; cross-person: subjects.
        seed: of the splits made of the scenario.

    Raises:
        ConfigError: unknown scenario, or no domain of that number.
        DataError: the data cannot give it (the message says why and what they can give), or something leaks.
        NotFoundError: no subject or domain of that name.
    """
    check_scenario_name(name)
    if name == "cross-person":
        return cross_person(prepared, target, seed)
    parts = _divided(name, prepared, DIVISIONS[name])
    number = _number_of(target, [part.name for part in parts], f"{prepared.dataset.name}, {name}")
    domains = [_domain(prepared, part, _wearers(prepared, part)) for part in parts]
    sources = tuple(domain for domain in domains if domain is not domains[number])
    return _checked(name, prepared, sources, domains[number], seed)


def cross_person(prepared: Prepared, target: int | tuple[str, ...], seed: int = 0) -> Scenario:
    """Train on some people, test on others.

    Args:
        prepared: the data set.
        target: number of the person group to hold out (specs/ood.md 1.2 where it defines groups), or the subjects.
        seed: of the splits made of the scenario.

    Returns:
        One source domain a remaining group, without the held-out subjects. Groups that the data set defines but of
        whom nobody has windows are left out and not counted; missing people are named in a warning.

    Raises:
        DataError: wearers are unknown, or nobody is left to train on.
        ConfigError: no such group.
        NotFoundError: no such subject.
    """
    groups = _divided("cross-person", prepared, person_groups)
    _warn_of_missing_people(prepared)
    if isinstance(target, int):
        names = [f"persons {'+'.join(group)}" for group in groups]
        held = groups[_number_of(target, names, f"{prepared.dataset.name}, cross-person")]
    else:
        held = target
    unknown = sorted(set(held) - set(prepared.windows.subjects()))
    if unknown or not held:
        raise NotFoundError(
            f"data set {prepared.dataset.name} has no windows of subjects {unknown}; "
            f"known: {', '.join(prepared.windows.subjects())}"
        )
    rest = [tuple(s for s in group if s not in held) for group in groups]
    sources = tuple(_persons(prepared, group) for group in rest if group)
    if not sources:
        raise DataError(f"all persons of {prepared.dataset.name} are held out; leave some to train on")
    return _checked("cross-person", prepared, sources, _persons(prepared, held), seed)


def possible_scenarios(prepared: Prepared) -> tuple[str, ...]:
    """The scenarios that a data set can give."""
    return tuple(
        name
        for name, divide in DIVISIONS.items()
        if name in prepared.dataset.views or _refusal(prepared, divide) is None
    )


def check_scenario_name(name: str) -> None:
    """ConfigError, which lists the known scenarios, for an unknown one."""
    if name not in DIVISIONS:
        raise ConfigError(f"unknown scenario {name!r}; known: {', '.join(DIVISIONS)}")


def split_sources(scenario: Scenario, rule: str = "block", fraction: float = _FRACTION) -> SourceSplit:
    """Split every source domain into training and validation, and check that nothing leaks.

    Args:
        scenario: what to split; its seed drives the rule.
        rule: a name of :data:`wearfleet_cloud.data.splits.SPLITS`.
        fraction: share for validation.

    Raises:
        ConfigError: unknown rule, or a fraction outside (0, 1).
        DataError: a domain has too few windows for both parts, by-person with domains of one person, or leakage
            (which ``LEAKING_RULES`` tolerate and count).
    """
    if rule not in SPLITS:
        raise ConfigError(f"unknown split rule {rule!r}; known: {', '.join(SPLITS)}")
    windows = scenario.prepared.windows
    splits = [SPLITS[rule](windows, domain.index, fraction, scenario.seed) for domain in scenario.sources]
    for domain, split in zip(scenario.sources, splits, strict=True):
        if len(split.train) == 0 or len(split.validation) == 0:
            raise DataError(
                f"source domain {domain.name}: rule {rule!r} makes {len(split.train)} training and "
                f"{len(split.validation)} validation windows of {len(domain)}; both are needed: choose another rule or "
                "a larger group"
            )
    if rule not in LEAKING_RULES:
        train = np.concatenate([split.train for split in splits])
        validation = np.concatenate([split.validation for split in splits])
        leakage_check(windows, train, validation, persons_apart=rule == "person")
    pairs = list(zip(scenario.sources, splits, strict=True))
    return SourceSplit(
        train=tuple(_part(domain, split.train) for domain, split in pairs),
        validation=tuple(_part(domain, split.validation) for domain, split in pairs),
        leaking=sum(split.leaking for split in splits),
    )


def _divided(name: str, prepared: Prepared, divide: Callable[[Prepared], T]) -> T:
    dataset = prepared.dataset
    if name in dataset.views:
        raise ConfigError(
            f"for {name} the recordings of {dataset.name} are cut otherwise: use open_scenario, or prepare "
            f"dataset.for_scenario({name!r})"
        )
    try:
        return divide(prepared)
    except DataError as error:
        can = ", ".join(possible_scenarios(prepared)) or "none"
        raise DataError(f"data set {dataset.name} cannot give {name}: {error}; it can give: {can}") from error


def _refusal(prepared: Prepared, divide: Callable[[Prepared], tuple[Part, ...]]) -> DataError | None:
    try:
        divide(prepared)
    except DataError as error:
        return error
    return None


def _number_of(target: int | tuple[str, ...], names: list[str], where: str) -> int:
    if isinstance(target, int):
        if 0 <= target < len(names):
            return target
        raise ConfigError(
            f"{where}: expected one of the groups 0 to {len(names) - 1}, got target {target}; "
            f"they are: {'; '.join(names)}"
        )
    if len(target) == 1 and target[0] in names:
        return names.index(target[0])
    raise NotFoundError(f"{where}: no domain {', '.join(target)!r}; known: {', '.join(names)}")


def _checked(
    name: str, prepared: Prepared, sources: tuple[Domain, ...], target: Domain, seed: int
) -> Scenario:
    own = np.concatenate([domain.index for domain in sources])
    leakage_check(prepared.windows, own, target.index, persons_apart=name in _PERSONS_APART)
    new = np.setdiff1d(target.y, prepared.windows.activity[own])
    if len(new):
        _log.warning(
            "%s: no source has a window of %s; every such window of the target counts as an error",
            target.name,
            ", ".join(prepared.dataset.label_names[label] for label in new),
        )
    return Scenario(name, prepared, sources, _tested(target, prepared.dataset.target_part, seed), seed)


def _tested(target: Domain, part: float, seed: int) -> Domain:
    """The part of the target that is tested on: the last of a three-way split where it is not all."""
    if part == 1.0:
        return target
    return _part(target, target.index[three_way(target.y, part, seed)[2]])


def _warn_of_missing_people(prepared: Prepared) -> None:
    dataset = prepared.dataset
    missing = {s for group in dataset.domain_groups for s in group} - set(prepared.windows.subjects())
    if missing:
        _log.warning(
            "%s: no windows of %s; groups are smaller than defined, or gone and not counted",
            dataset.name,
            ", ".join(sorted(missing)),
        )


def _persons(prepared: Prepared, subjects: tuple[str, ...]) -> Domain:
    part = Part(f"persons {'+'.join(subjects)}", prepared.windows.of_subjects(subjects))
    return _domain(prepared, part, subjects)


def _wearers(prepared: Prepared, part: Part) -> tuple[str, ...]:
    return tuple(np.unique(prepared.windows.subject[part.index]).tolist())


def _domain(prepared: Prepared, part: Part, subjects: tuple[str, ...]) -> Domain:
    windows, index = prepared.windows, part.index
    return Domain(part.name, subjects, np.asarray(windows.x[index]), windows.activity[index], index)


def _part(domain: Domain, index: NDArray[np.int64]) -> Domain:
    own = np.searchsorted(domain.index, index)  # both ascending
    return Domain(domain.name, domain.subjects, domain.x[own], domain.y[own], index)
