"""Federated learning: strategies, the compiler of their plans, the round and the average."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Final

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.ditto import Ditto
from wearfleet_cloud.federated.fedadagrad import FedAdagrad
from wearfleet_cloud.federated.fedadam import FedAdam
from wearfleet_cloud.federated.fedavg import FedAvg
from wearfleet_cloud.federated.fedavgm import FedAvgM
from wearfleet_cloud.federated.fedbn import FedBN
from wearfleet_cloud.federated.fednova import FedNova
from wearfleet_cloud.federated.fedper import FedPer
from wearfleet_cloud.federated.fedprox import FedProx
from wearfleet_cloud.federated.fedrep import FedRep
from wearfleet_cloud.federated.fedyogi import FedYogi
from wearfleet_cloud.federated.local_only import LocalOnly
from wearfleet_cloud.federated.perfedavg import PerFedAvg
from wearfleet_cloud.federated.scaffold import Scaffold
from wearfleet_cloud.federated.training_options import LocalTraining, parse_options

__all__ = ["STRATEGIES", "create_strategy"]

_Class = type[
    Ditto
    | FedAdagrad
    | FedAdam
    | FedAvg
    | FedAvgM
    | FedBN
    | FedNova
    | FedPer
    | FedProx
    | FedRep
    | FedYogi
    | LocalOnly
    | PerFedAvg
    | Scaffold
]

STRATEGIES: Final[Mapping[str, _Class]] = {
    "ditto": Ditto,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedbn": FedBN,
    "fednova": FedNova,
    "fedper": FedPer,
    "fedprox": FedProx,
    "fedrep": FedRep,
    "fedyogi": FedYogi,
    "local": LocalOnly,
    "perfedavg": PerFedAvg,
    "scaffold": Scaffold,
}


def create_strategy(name: str, options: Mapping[str, object]) -> Strategy:
    """A strategy by name with its hyper-parameters.

    Args:
        name: key of ``STRATEGIES``.
        options: those of ``LocalTraining`` and the strategy's own, for example ``mu``.

    Raises:
        ConfigError: an unknown strategy or option, or a value out of range.
    """
    chosen = STRATEGIES.get(name)
    if chosen is None:
        raise ConfigError(f"unknown strategy {name!r}; known: {', '.join(sorted(STRATEGIES))}")
    own_names = {field.name for field in fields(chosen)}
    own = parse_options(chosen, {k: v for k, v in options.items() if k in own_names})
    rest = {k: v for k, v in options.items() if k not in own_names}
    known = sorted({*own_names, *(f.name for f in fields(LocalTraining))} - {"local", "averaging"})
    unknown = sorted(rest.keys() - set(known))
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} of {name}; known: {', '.join(known)}")
    return chosen(local=LocalTraining.parse(rest), **own)
