"""Federated learning: strategies, the compiler of their plans, the round and the average."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Final

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.federated.aggregate import Averaging
from wearfleet_cloud.federated.base import AveragingStrategy, Strategy
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

STRATEGIES: Final[Mapping[str, type[AveragingStrategy]]] = {
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
        options: those of ``LocalTraining`` and ``Averaging``, and the strategy's own, for example ``mu``.

    Raises:
        ConfigError: an unknown strategy or option, or a value out of range.
    """
    chosen = STRATEGIES.get(name)
    if chosen is None:
        raise ConfigError(f"unknown strategy {name!r}; known: {', '.join(sorted(STRATEGIES))}")
    parts = {"local": LocalTraining, "averaging": Averaging}
    known = {f.name for of in (chosen, *parts.values()) for f in fields(of)} - parts.keys()
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} of {name}; known: {', '.join(sorted(known))}")
    strategy = chosen(local=LocalTraining(**_own(LocalTraining, options)), **_own(chosen, options))
    averaging = replace(strategy.averaging, **_own(Averaging, options))
    return replace(strategy, averaging=averaging)


def _own(cls: type[Any], options: Mapping[str, object]) -> dict[str, Any]:
    """Values for the fields of a dataclass."""
    names = {field.name for field in fields(cls)}
    return parse_options(cls, {name: value for name, value in options.items() if name in names})
