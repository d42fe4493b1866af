"""Every pair of the composition matrix: what is sound is made, what is not is refused when the job is made."""

from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import ClassVar

import pytest
from wearfleet_cloud.federated import STRATEGIES, composition, create_strategy
from wearfleet_cloud.federated.base import ADDITIONS, AveragingStrategy, StrategyInfo
from wearfleet_cloud.federated.composition import UNSOUND_PAIRS, additions_of, check_additions
from wearfleet_protos.errors import ConfigError

UNSOUND = {
    ("scaffold", "robust"),
    ("scaffold", "async"),
    ("fednova", "async"),
    ("fednova", "secagg"),  # section 21 allows it with updates that clients scale by all clients' steps
    ("fednova", "central_dp"),  # section 21 allows it; see composition.py
    ("fednova", "local_dp"),
    ("fedbuff", "secagg"),
    *(
        (name, addition)
        for name in ("epfl", "fedap", "fedhealth2", "metafed")
        for addition in ("secagg", "central_dp", "local_dp", "record_dp", "robust", "async")
    ),
    # section 21 has record-level privacy for the ring; see composition.py
    *((name, "record_dp") for name in ("fedrep", "fedclip", "zoopfl", "perfedavg")),
    ("metafed", "compression"),
    *(("metafed-site", addition) for addition in ADDITIONS if addition != "partial_participation"),
    *(
        ("local", addition)
        for addition in ("secagg", "central_dp", "local_dp", "record_dp", "robust", "compression")
    ),
}
"""Of specs/federated.md section 21, written again by hand."""

UNSOUND_TOGETHER = {
    frozenset(pair)
    for pair in (
        ("secagg", "robust"),
        ("secagg", "async"),
        ("secagg", "compression"),
        ("secagg", "central_dp"),
        ("central_dp", "robust"),
        ("central_dp", "async"),
    )
}

ALL = StrategyInfo("all", "none")


@pytest.mark.parametrize("addition", ADDITIONS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_takes_what_it_composes_with(name: str, addition: str) -> None:
    if addition in STRATEGIES[name].info.composes_with:
        assert (name, addition) not in UNSOUND
        check_additions(STRATEGIES[name].info, [addition])
        return
    with pytest.raises(ConfigError, match=f"^{name} cannot be combined with {addition}: .*(use|leave)"):
        check_additions(STRATEGIES[name].info, [addition])


@pytest.mark.parametrize(("one", "other"), list(combinations(ADDITIONS, 2)))
def test_a_pair_of_additions(one: str, other: str) -> None:
    if {one, other} not in UNSOUND_TOGETHER:
        check_additions(ALL, [one, other])
        return
    for pair in ((one, other), (other, one)):
        with pytest.raises(
            ConfigError, match=rf"^{pair[0]} cannot be combined with {pair[1]}: .*(use|leave)"
        ):
            check_additions(ALL, pair)


def test_the_third_of_three_additions_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="secagg cannot be combined with robust"):
        check_additions(ALL, ["partial_participation", "secagg", "local_dp", "robust"])


def test_tables_name_only_what_exists() -> None:
    assert all(pair <= set(ADDITIONS) and len(pair) == 2 for pair in UNSOUND_PAIRS)
    for name, addition in composition._UNSOUND_WITH:
        assert addition in set(ADDITIONS) - set(STRATEGIES[name].info.composes_with)


def test_a_strategy_without_a_reason_of_its_own_is_refused_with_what_it_composes_with() -> None:
    with pytest.raises(ConfigError, match="odd cannot be combined with async: it composes with robust"):
        check_additions(StrategyInfo("odd", "none", composes_with=("robust",)), ["async"])


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_is_switched_on_unless_asked_for(name: str) -> None:
    strategy = create_strategy(name, {})
    assert isinstance(strategy, AveragingStrategy)
    assert additions_of(strategy) == ()
    assert set(STRATEGIES[name].info.composes_with) <= set(ADDITIONS)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_two_options_have_one_name(name: str) -> None:
    parts = {part.name for part in fields(AveragingStrategy)}
    options = [f.name for part in fields(AveragingStrategy) for f in fields(part.type)]
    options += [f.name for f in fields(STRATEGIES[name]) if f.name not in parts]
    assert len(options) == len(set(options))


@dataclass(frozen=True, slots=True)
class Masks:
    masks: str = "off"

    @property
    def addition(self) -> str:
        return "secagg" if self.masks == "on" else ""


@dataclass(frozen=True, slots=True)
class Masked(AveragingStrategy):
    info: ClassVar[StrategyInfo] = StrategyInfo("masked", "none", composes_with=())
    secagg: Masks = field(default_factory=Masks)


def test_a_job_is_refused_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("wearfleet_cloud.federated", "wearfleet_cloud.federated.composition"):
        monkeypatch.setattr(f"{module}.AveragingStrategy", Masked)
    monkeypatch.setattr("wearfleet_cloud.federated.STRATEGIES", {"masked": Masked})
    create_strategy("masked", {})
    with pytest.raises(ConfigError, match="masked cannot be combined with secagg"):
        create_strategy("masked", {"masks": "on"})
    with pytest.raises(ConfigError, match=r"unknown option 'mask' of masked; known: .*masks"):
        create_strategy("masked", {"mask": "on"})
