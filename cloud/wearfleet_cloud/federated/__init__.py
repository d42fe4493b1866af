"""Federated learning: strategies, the compiler of their plans, the round and the average."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Final

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.federated.base import AveragingStrategy, Strategy
from wearfleet_cloud.federated.composition import check_composition
from wearfleet_cloud.federated.ditto import Ditto
from wearfleet_cloud.federated.epfl import EPFL
from wearfleet_cloud.federated.fedadagrad import FedAdagrad
from wearfleet_cloud.federated.fedadam import FedAdam
from wearfleet_cloud.federated.fedap import FedAP
from wearfleet_cloud.federated.fedavg import FedAvg
from wearfleet_cloud.federated.fedavgm import FedAvgM
from wearfleet_cloud.federated.fedbn import FedBN
from wearfleet_cloud.federated.fedbuff import FedBuff
from wearfleet_cloud.federated.fedclip import FedClip
from wearfleet_cloud.federated.fedhealth2 import FedHealth2
from wearfleet_cloud.federated.fednova import FedNova
from wearfleet_cloud.federated.fedper import FedPer
from wearfleet_cloud.federated.fedprox import FedProx
from wearfleet_cloud.federated.fedrep import FedRep
from wearfleet_cloud.federated.fedyogi import FedYogi
from wearfleet_cloud.federated.local_only import LocalOnly
from wearfleet_cloud.federated.metafed import MetaFed
from wearfleet_cloud.federated.metafed_site import MetaFedSite
from wearfleet_cloud.federated.perfedavg import PerFedAvg
from wearfleet_cloud.federated.scaffold import Scaffold
from wearfleet_cloud.federated.training_options import option_names, parse_options
from wearfleet_cloud.federated.zoopfl import ZooPFL

__all__ = ["STRATEGIES", "create_strategy", "default_options"]

STRATEGIES: Final[Mapping[str, type[AveragingStrategy]]] = {
    "ditto": Ditto,
    "epfl": EPFL,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedap": FedAP,
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedbn": FedBN,
    "fedbuff": FedBuff,
    "fedclip": FedClip,
    "fedhealth2": FedHealth2,
    "fednova": FedNova,
    "fedper": FedPer,
    "fedprox": FedProx,
    "fedrep": FedRep,
    "fedyogi": FedYogi,
    "local": LocalOnly,
    "metafed": MetaFed,
    "metafed-site": MetaFedSite,
    "perfedavg": PerFedAvg,
    "scaffold": Scaffold,
    "zoopfl": ZooPFL,
}


def create_strategy(name: str, options: Mapping[str, object]) -> Strategy:
    """A strategy by name with its hyper-parameters.

    Args:
        name: key of ``STRATEGIES``.
        options: the strategy's own, for example ``mu``, and those of its parts (fields of ``AveragingStrategy``).

    Raises:
        ConfigError: an unknown strategy or option, a value out of range, or parts that do not belong together.
    """
    chosen = STRATEGIES.get(name)
    if chosen is None:
        raise ConfigError(f"unknown strategy {name!r}; known: {', '.join(sorted(STRATEGIES))}")
    known = default_options(name)
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} of {name}; known: {', '.join(sorted(known))}")
    parts = {part.name: getattr(chosen(), part.name) for part in fields(AveragingStrategy)}
    made = {part: replace(value, **_own(type(value), options)) for part, value in parts.items()}
    made["local"] = replace(made["local"], record=made["privacy"].record)
    strategy = chosen(**made, **_own(chosen, options))
    check_composition(strategy)
    return strategy


def default_options(name: str) -> dict[str, object]:
    """Every option of a strategy, its own first, with the value it has when it is not given."""
    plain = STRATEGIES[name]()
    parts = (plain, *(getattr(plain, part.name) for part in fields(AveragingStrategy)))
    return {
        field.name: getattr(part, field.name)
        for part in parts
        for field in fields(part)
        if field.name in option_names(type(part))
    }


def _own(cls: type[Any], options: Mapping[str, object]) -> dict[str, Any]:
    """Values for the fields of a dataclass."""
    names = option_names(cls)
    return parse_options(cls, {name: value for name, value in options.items() if name in names})
