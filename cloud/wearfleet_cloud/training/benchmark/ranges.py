"""From where the hyper-parameters of a configuration are drawn.

Source: specs/ood.md 1.9 (random ranges of DomainBed) and, for the papers of section 3, the values they searched, in
their sections. Ours, because no grid is known: the concentration of ``guided`` as Mixup's alpha, ERM++, and the spans
of SOT, from one of its two published settings to the other. The draw of a value depends on the name of the setting and
the number of the configuration alone, so that all methods of a configuration share what they have in common. ``mode``
is not drawn: it asks another question.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from wearfleet_cloud.algorithms import algorithm_info

__all__ = ["RANGES", "drawn_settings"]

Draw = Callable[[np.random.Generator], float | str]
Number = Callable[[np.random.Generator], float]


def _ten_to(low: float, high: float) -> Number:
    return lambda generator: float(10.0 ** generator.uniform(low, high))


def _uniform(low: float, high: float) -> Number:
    return lambda generator: float(generator.uniform(low, high))


def _one_of(*values: float) -> Number:
    return lambda generator: float(generator.choice(values))


def _choice(*values: str) -> Draw:
    return lambda generator: str(generator.choice(values))


def _whole(draw: Number) -> Number:
    return lambda generator: float(int(draw(generator)))


_COMMON: Final[Mapping[str, Draw]] = {
    "lr": _ten_to(-4.5, -2.5),
    "batch": lambda generator: float(int(2.0 ** generator.uniform(3.0, 5.5))),
}
RANGES: Final[Mapping[str, Mapping[str, Draw]]] = {
    "mixup": {"alpha": _ten_to(-1, 1)},
    "dann": {"alpha": _ten_to(-2, 2)},
    "coral": {"gamma": _ten_to(-1, 1)},
    "mmd": {"gamma": _ten_to(-1, 1)},
    "vrex": {"lam": _ten_to(-1, 5), "anneal_steps": _whole(_ten_to(0, 4))},
    "lag": {"gamma": _ten_to(-1, 1), "local_gamma": _ten_to(-1, 1)},
    "mldg": {"beta": _ten_to(-1, 1)},
    "rsc": {"features": _uniform(0.0, 0.5), "windows": _uniform(0.0, 0.5)},
    "group-dro": {"eta": _ten_to(-3, -1)},
    "and-mask": {"tau": _uniform(0.5, 1.0)},
    "fish": {"epsilon": _one_of(0.05, 0.1, 0.5)},
    "fishr": {
        "lam": _ten_to(1, 4),
        "anneal_steps": _whole(_uniform(0, 5000)),
        "ema": _uniform(0.9, 0.99),
    },
    "urm": {"gamma": _uniform(0.0, 0.2), "depth": _choice("1", "2", "3"), "output": _choice("tanh", "relu")},
    "ddlearn": {
        "self_weight": _ten_to(-2, 1),
        "diversity_weight": _ten_to(-2, 1),
        "contrast_weight": _ten_to(-1, 1),
    },
    "erm-plus-plus": {"tail": _ten_to(0, 1.5), "linear_steps": _whole(_uniform(0, 1000))},
    "difex": {
        "alpha": _one_of(1e-3, 1e-2, 0.1),
        "beta": _one_of(0.0, 1e-2, 0.1, 0.5, 1.0, 10.0),
        "lam": _one_of(0.0, 1e-2, 0.1, 1.0),
        "distance": _choice("2-norm", "norm-2-norm", "norm-1-norm", "cos"),
    },
    "fix": {"mixup_alpha": _one_of(0.1, 0.2), "reversal": _one_of(0.1, 0.5, 1.0)},
    "fixed": {
        "mixup_alpha": _one_of(0.1, 0.2),
        "reversal": _one_of(0.1, 0.5, 1.0),
        "gamma": _one_of(10.0, 100.0, 1e4),
        "top_k": _choice("1", "5"),
    },
    "sdmix": {
        "mixup_alpha": _one_of(0.1, 0.2, 0.5, 1.0),
        "gamma": _one_of(10.0, 100.0, 1e4, 1e5),
        "top_k": _choice("2", "5"),
        "radius": _choice("largest", "mean"),
        "distance": _choice("manhattan", "euclidean", "cosine"),
    },
    "diversify": {
        "latent_domains": _choice("2", "3", "5", "10", "20"),
        "local_passes": _choice("1", "3", "5", "10", "30"),
        "class_reversal": _one_of(0.1, 0.5, 1.0),
        "reversal": _one_of(0.1, 1.0, 10.0),
    },
    "affar": {"lam": _one_of(1e-2, 0.1, 1.0, 10.0), "beta": _one_of(1e-2, 0.1, 1.0, 10.0)},
    "guided": {"concentration": _ten_to(-1, 1)},
    "sot": {
        "clusters": _one_of(19, 50, 100, 200),
        "epsilon": _ten_to(-1, np.log10(0.5)),
        "eta": _ten_to(-1, 0),
        "relaxation": _ten_to(-1, np.log10(3.0)),
    },
}
"""Algorithm -> setting -> how it is drawn; a method that is missing searches only what all have."""


def drawn_settings(algorithm: str, configuration: int, fixed: frozenset[str]) -> tuple[str, ...]:
    """The settings of a configuration.

    Args:
        algorithm: name in ``ALGORITHMS``, or the path of a user's file.
        configuration: its number; 0 is the defaults.
        fixed: names that the user has set, which are not drawn.

    Returns:
        "name=value" each.

    Raises:
        ConfigError: an unknown algorithm.
    """
    ranges = {**_COMMON, **RANGES.get(algorithm_info(algorithm).name, {})}
    if configuration == 0:
        return ()
    return tuple(
        f"{name}={_text(draw(_generator(name, configuration)))}"
        for name, draw in ranges.items()
        if name not in fixed
    )


def _generator(name: str, configuration: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{configuration}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _text(value: float | str) -> str:
    """Short, and read back exactly enough to be the same float32."""
    return value if isinstance(value, str) else f"{value:.9g}"
