"""Settings given as ``name=value`` text, sorted into those of the network, of training and of the algorithm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from wearfleet_models import ModelSpec
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.algorithms import algorithm_info
from wearfleet_cloud.data.dataset import Dataset
from wearfleet_cloud.training.config import TrainConfig
from wearfleet_cloud.training.trainer import model_spec_for

__all__ = ["held_out", "known_settings", "run_settings"]


def _pair(text: str) -> tuple[float, float]:
    first, second = text.split(",")
    return float(first), float(second)


_MODEL: Final[Mapping[str, Callable[[str], object]]] = {
    "kernel": int,
    "dropout": float,
    "feedforward": int,
    "neck": str,
    "neck_width": int,
}
_TRAINING: Final[Mapping[str, Callable[[str], object]]] = {
    "batch": int,
    "lr": float,
    "optimiser": str,
    "betas": _pair,
    "momentum": float,
    "weight_decay": float,
    "evaluate_every": int,
    "split": str,
    "standardise": str,
    "selection": str,
}


def held_out(target: str) -> int | tuple[str, ...]:
    """``2`` is the number of a domain; ``02``, ``2,``, ``2,5`` and ``torso`` are names."""
    if target.isdigit() and str(int(target)) == target:
        return int(target)
    return tuple(name for name in target.split(",") if name)


def known_settings(algorithm: str) -> frozenset[str]:
    """Names of all settings that runs of an algorithm have; ConfigError for an unknown algorithm."""
    info = algorithm_info(algorithm)
    return frozenset({*_MODEL, *_TRAINING, *info.hyper, *info.options})


def run_settings(
    dataset: Dataset, algorithm: str, config: TrainConfig, backbone: str, settings: Sequence[str]
) -> tuple[ModelSpec, TrainConfig]:
    """The network and the configuration of a run.

    Args:
        dataset: gives the shape of the windows.
        algorithm: its hyper-parameters and options can be set too.
        config: what the settings are laid over.
        backbone: a key of ``BACKBONES``.
        settings: "name=value" each; the later of two wins.

    Raises:
        ConfigError: not of that form, an unknown name (the message lists the known ones), or a bad value.
    """
    info = algorithm_info(algorithm)
    model: dict[str, Any] = {}
    training: dict[str, Any] = {}
    hyper, options = dict(config.hyper), dict(config.options)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"a setting is name=value, got {setting!r}")
        if name in _MODEL:
            model[name] = _parsed(_MODEL[name], name, text)
        elif name in _TRAINING:
            training[name] = _parsed(_TRAINING[name], name, text)
        elif name in info.hyper:
            hyper[name] = float(str(_parsed(float, name, text)))
        elif name in info.options:
            options[name] = text
        else:
            known = sorted(known_settings(algorithm))
            raise ConfigError(f"unknown setting {name!r}; known for {algorithm}: {', '.join(known)}")
    spec = replace(model_spec_for(dataset, backbone), **model)
    return spec, replace(config, hyper=hyper, options=options, **training)


def _parsed(kind: Callable[[str], object], name: str, text: str) -> object:
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"setting {name}={text}: not a value of the right kind ({error})") from error
