"""Which additions a strategy may be combined with: checked when a job is made, never at run time.

An addition is switched on by a part of the strategy (``AveragingStrategy``'s fields beside its own hyper-parameters).
Refused are what the strategy itself does not compose with, and pairs of additions that undo each other.

Source: specs/federated.md section 21, and what sections 16 to 20 say about pairs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from itertools import combinations
from typing import Final, Protocol, runtime_checkable

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.federated.base import AveragingStrategy, StrategyInfo

__all__ = ["UNSOUND_PAIRS", "Addition", "additions_of", "check_additions", "check_composition"]


@runtime_checkable
class Addition(Protocol):
    """A part of a strategy that can be switched on."""

    @property
    def addition(self) -> str:
        """Empty when off, else a name of ``base.ADDITIONS``."""


UNSOUND_PAIRS: Final[Mapping[frozenset[str], str]] = {
    frozenset({"secagg", "robust"}): (
        "under secure aggregation the server sees only a sum, so no rule can compare updates; use rule=mean, with "
        "members that cut what they send to secagg_clip, or leave secure aggregation off"
    ),
    frozenset({"secagg", "async"}): (
        "masks cancel only among clients that are present together, and a buffer mixes clients that started at "
        "different times; run rounds, or leave secure aggregation off"
    ),
    frozenset({"secagg", "compression"}): (
        "masked words must be summed coordinate by coordinate, and a codec encodes every client's differently; secure "
        "aggregation quantises by itself, so leave the codec at float32"
    ),
    frozenset({"secagg", "central_dp"}): (
        "under secure aggregation the server sees only a sum and cannot clip a client's update; use local privacy, "
        "whose clip and noise are the device's"
    ),
    frozenset({"central_dp", "robust"}): (
        "the noise is calibrated for a mean of clipped updates, and one client can move what a robust rule selects by "
        "more than that; clipping already bounds every client, so use rule=mean, or local privacy"
    ),
    frozenset({"central_dp", "async"}): (
        "the accountant counts one participation of a client a round, and a buffer may hold a fast client again and "
        "again; run rounds, or use local privacy"
    ),
}
"""Pairs of additions that must not meet, whatever the strategy: why, and what to do instead."""

_MIXTURES: Final[Mapping[str, str]] = {
    "secagg": "a client's mixture is made of single models, which a sum does not show; use fedbn or ditto",
    "central_dp": "noise in a sum protects none of the single models that mixtures are made of; use fedbn or ditto",
    "local_dp": "clients are compared by small statistics that the noise would drown; use fedbn or ditto",
    "record_dp": (
        "clients are compared by statistics of their windows, which no noise of a step covers; use fedbn or ditto"
    ),
    "robust": "a rule makes one model for all; a mixture weighs strange models low by itself; use ditto for a bound",
    "async": "a mixture is made of models of one version; use fedbuff, or ditto in rounds",
    "downlink": (
        "every client is sent a model of its own, and the service keeps none of these to take a difference to; leave "
        "it at whole (frozen tensors travel once in any case)"
    ),
}
_RING: Final[Mapping[str, str]] = {
    "secagg": "a ring has no sum: each model goes to the next client alone; use fedavg",
    "central_dp": "a ring has no sum that the server could noise; use fedavg",
    "local_dp": "noise would add up at every hop of the ring; use fedavg",
    "record_dp": (
        "whether a client takes a model over or learns from it follows from counted hits on its windows, which no "
        "noise covers; use fedavg or ditto"
    ),
    "robust": "poison travels the ring from client to client and no rule sees two models; use fedavg or ditto",
    "compression": "what a codec leaves out is missing in the next client's model, not averaged away; leave it off",
    "async": "a ring has one client at work at a time; use fedbuff",
    "downlink": (
        "a client is asked once a lap, when the model has passed through all others, so a difference is as large as "
        "the model, and a lossy one would hand on what it lost; leave it at whole"
    ),
}

_UNSOUND_WITH: Final[Mapping[tuple[str, str], str]] = {
    ("scaffold", "robust"): (
        "a rule that leaves an update out breaks the sum of the control variates; use fedavg or fednova"
    ),
    ("scaffold", "async"): "a control variate belongs to the model its client started from; use fedavg",
    ("fednova", "central_dp"): (
        "tau_eff depends on the steps of every client, so one client scales what all others send and clipping does not "
        "bound it; use fedavg or fedprox"
    ),
    ("fednova", "secagg"): (
        "updates are divided by each client's number of steps, which the server does not learn under secure "
        "aggregation; use fedavg or fedprox"
    ),
    ("fednova", "local_dp"): (
        "the server divides by the steps of every client, and under local privacy a device keeps them to itself; use "
        "fedavg or fedprox"
    ),
    ("fednova", "async"): "updates are normalised by the steps of all clients of a round; use fedavg",
    ("fedbuff", "secagg"): (
        "masks cancel only among clients that are present together, and a buffer mixes clients that started at "
        "different times; use fedavg in rounds"
    ),
    ("fedrep", "record_dp"): (
        "head and body are trained in two phases, each of which would cost as much; use fedper, which trains both in "
        "one"
    ),
    ("perfedavg", "record_dp"): (
        "a meta-gradient mixes the windows of a batch, so none has a gradient of its own to clip; use ditto"
    ),
    ("fedclip", "record_dp"): (
        "its loss contrasts the windows of a batch with each other, so none has a gradient of its own to clip; use "
        "fedper"
    ),
    ("zoopfl", "record_dp"): (
        "its steps are differences of losses of a whole batch, so no window has a gradient to clip; use fedper"
    ),
    **{
        (name, addition): why
        for name in ("epfl", "fedap", "fedhealth2")
        for addition, why in _MIXTURES.items()
    },
    **{("metafed", addition): why for addition, why in _RING.items()},
    **{
        ("local", addition): "nothing is uploaded, so there is nothing to do it to; leave it off"
        for addition in ("secagg", "central_dp", "local_dp", "record_dp", "robust", "compression")
    },
}


def check_composition(strategy: AveragingStrategy) -> None:
    """Refuse a strategy whose switched-on parts do not belong together.

    Raises:
        ConfigError: see :func:`check_additions`.
    """
    check_additions(strategy.info, additions_of(strategy))


def additions_of(strategy: AveragingStrategy) -> tuple[str, ...]:
    """Names of the additions that are switched on, in the order of the parts."""
    parts = (getattr(strategy, part.name) for part in fields(AveragingStrategy))
    return tuple(part.addition for part in parts if isinstance(part, Addition) and part.addition)


def check_additions(info: StrategyInfo, additions: Iterable[str]) -> None:
    """Refuse additions that do not belong together.

    Args:
        info: of the strategy.
        additions: names of ``base.ADDITIONS``.

    Raises:
        ConfigError: the strategy does not compose with one of them, or two of them undo each other; with the reason
            and what to do instead.
    """
    chosen = tuple(additions)
    for addition in chosen:
        if addition not in info.composes_with:
            reason = _UNSOUND_WITH.get(
                (info.name, addition),
                f"it composes with {', '.join(info.composes_with)}; leave it off, or use one of "
                "`wearfleet-cloud strategies` that composes with it",
            )
            raise ConfigError(f"{info.name} cannot be combined with {addition}: {reason}")
    for one, other in combinations(chosen, 2):
        if (why := UNSOUND_PAIRS.get(frozenset({one, other}))) is not None:
            raise ConfigError(f"{one} cannot be combined with {other}: {why}")
