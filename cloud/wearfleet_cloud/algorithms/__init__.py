"""Algorithms for models that survive new people, positions, devices and days; one paper a file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from wearfleet_models import Classifier, ModelSpec
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.algorithms.affar import Affar
from wearfleet_cloud.algorithms.and_mask import AndMask
from wearfleet_cloud.algorithms.base import Algorithm, AlgorithmInfo, Batch, State
from wearfleet_cloud.algorithms.coral import Coral
from wearfleet_cloud.algorithms.dann import Dann
from wearfleet_cloud.algorithms.ddlearn import DDLearn
from wearfleet_cloud.algorithms.difex import Difex
from wearfleet_cloud.algorithms.diversify import Diversify
from wearfleet_cloud.algorithms.erm import Erm
from wearfleet_cloud.algorithms.erm_plus_plus import ErmPlusPlus
from wearfleet_cloud.algorithms.fish import Fish
from wearfleet_cloud.algorithms.fishr import Fishr
from wearfleet_cloud.algorithms.fixed import Fix, Fixed
from wearfleet_cloud.algorithms.group_dro import GroupDRO
from wearfleet_cloud.algorithms.guided import Guided
from wearfleet_cloud.algorithms.lag import Lag
from wearfleet_cloud.algorithms.mixup import Mixup
from wearfleet_cloud.algorithms.mldg import Mldg
from wearfleet_cloud.algorithms.mmd import Mmd
from wearfleet_cloud.algorithms.rsc import Rsc
from wearfleet_cloud.algorithms.sdmix import SDMix
from wearfleet_cloud.algorithms.sot import Sot
from wearfleet_cloud.algorithms.urm import Urm
from wearfleet_cloud.algorithms.vrex import VREx
from wearfleet_cloud.training.optimisers import Optimiser
from wearfleet_cloud.user_file import is_user_file, variable_of

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmInfo",
    "Batch",
    "State",
    "algorithm_info",
    "algorithm_kind",
    "build_algorithm",
    "network_of",
]

ALGORITHMS: Final[Mapping[str, type[Algorithm]]] = {
    "erm": Erm,
    "mixup": Mixup,
    "coral": Coral,
    "rsc": Rsc,
    "and-mask": AndMask,
    "fish": Fish,
    "mldg": Mldg,
    "fix": Fix,
    "fixed": Fixed,
    "dann": Dann,
    "mmd": Mmd,
    "vrex": VREx,
    "group-dro": GroupDRO,
    "sdmix": SDMix,
    "erm-plus-plus": ErmPlusPlus,
    "fishr": Fishr,
    "urm": Urm,
    "lag": Lag,
    "guided": Guided,
    "difex": Difex,
    "diversify": Diversify,
    "affar": Affar,
    "sot": Sot,
    "ddlearn": DDLearn,
}


def algorithm_kind(name: str) -> type[Algorithm]:
    """A registered algorithm, or the ``ALGORITHM`` of a Python file of the user's (docs/howto/own-algorithm.md).

    Args:
        name: a key of :data:`ALGORITHMS`, or a path that ends in ``.py``; the file is executed.

    Raises:
        ConfigError: unknown name (lists the known ones), no such file, or a file without an ``ALGORITHM``.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if not is_user_file(name):
        raise ConfigError(
            f"unknown algorithm {name!r}; known: {', '.join(ALGORITHMS)}, or the path of a .py file"
        )
    kind = variable_of(Path(name), "ALGORITHM")
    if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
        raise ConfigError(
            f"{name}: expected a variable ALGORITHM that holds a class of Algorithm, got {kind!r}"
        )
    return kind


def algorithm_info(name: str) -> AlgorithmInfo:
    """Metadata of an algorithm; arguments and errors as for :func:`algorithm_kind`."""
    return algorithm_kind(name).info


def network_of(
    name: str, spec: ModelSpec, domains: int, options: Mapping[str, str] | None = None
) -> ModelSpec:
    """The network that an algorithm trains, from the one that was asked for.

    Args:
        name: as for :func:`algorithm_kind`.
        spec: backbone and sizes.
        domains: number of source domains.
        options: choices named in the algorithm's metadata.

    Raises:
        ConfigError: unknown algorithm or option, or a backbone that the algorithm cannot use.
    """
    options = _checked(name, options)
    return algorithm_kind(name).network(spec, domains, options)


def build_algorithm(
    name: str,
    model: Classifier,
    optimiser: Optimiser,
    options: Mapping[str, str] | None = None,
    *,
    domains: int = 1,
) -> Algorithm:
    """Bind an algorithm to a network, which is put into training mode, and an optimiser.

    Args:
        name: as for :func:`algorithm_kind`.
        model: the network; its tensors become the initial state.
        optimiser: makes the updates.
        options: choices named in the algorithm's metadata.
        domains: number of source domains.

    Raises:
        ConfigError: unknown algorithm or option.
    """
    options = _checked(name, options)
    kind: Callable[..., Algorithm] = algorithm_kind(name)
    return kind(model.train(), optimiser, domains, **options)


def _checked(name: str, options: Mapping[str, str] | None) -> Mapping[str, str]:
    info, options = algorithm_info(name), options or {}
    for option, value in options.items():
        if option not in info.options or value not in info.options[option]:
            known = "; ".join(f"{key} = {' | '.join(values)}" for key, values in info.options.items())
            raise ConfigError(f"{name} has no option {option} = {value}; its options: {known or 'none'}")
    return options
