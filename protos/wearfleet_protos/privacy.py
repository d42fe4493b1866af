"""Clipping and noise of updates, for the device and the service alike, and the analytic Gaussian mechanism.

Noise is drawn as floating-point numbers in float64; the update is rounded to its own type afterwards, which costs no
privacy. The gaps between floating-point numbers are no secret (Mironov 2012): epsilon holds for a reader who does not
exploit them.
"""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING, Final

import numpy as np

from wearfleet_protos.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[np.generic]]

__all__ = ["clipped", "gaussian_epsilon", "joint_norm", "protected", "secret_generator"]

_SAFE: Final = 1.0 - 2.0**-22
"""Rounding of clipped values to float32, by at most 2^-24 each, must not carry them over the clip."""
_HALVINGS: Final = 200


def joint_norm(update: Arrays) -> float:
    """Euclidean norm over all tensors together, in float64."""
    return math.sqrt(sum(float(np.vdot(a, a)) for a in (np.asarray(v, np.float64) for v in update.values())))


def clipped(update: Arrays, norm: float, clip: float) -> Arrays:
    """The update times min(1, C / norm), in its types; one that fits is left as it is, a zero one too.

    Args:
        update: of a client.
        norm: its joint norm.
        clip: C.
    """
    if norm <= clip:
        return update
    factor = clip / norm * _SAFE
    return {
        name: np.asarray(np.asarray(v, np.float64) * factor).astype(v.dtype) for name, v in update.items()
    }


def protected(
    update: Arrays, clip: float, noise: float, generator: np.random.Generator
) -> dict[str, NDArray[np.generic]]:
    """A client's own protection: its update clipped to ``clip``, plus N(0, noise^2) in every coordinate.

    Args:
        update: float tensors.
        clip: largest joint norm, above 0.
        noise: standard deviation.
        generator: of the noise; on a device :func:`secret_generator`, and nobody else may know its state.
    """
    short = clipped(update, joint_norm(update), clip)
    return {
        name: np.asarray(np.asarray(value, np.float64) + generator.normal(0.0, noise, value.shape)).astype(
            value.dtype
        )
        for name, value in sorted(short.items())
    }


def secret_generator() -> np.random.Generator:
    """A generator seeded with 256 bits of the operating system, known to nobody."""
    return np.random.Generator(np.random.PCG64(secrets.randbits(256)))


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """The exact epsilon of one Gaussian release, for any epsilon; inf without noise.

    Solves delta = Phi(1 / 2s - e s) - exp(e) Phi(-1 / 2s - e s) for e, with s the noise over the sensitivity. The
    classical s = sqrt(2 ln(1.25 / delta)) / e holds below e = 1 only.

    Args:
        noise_multiplier: s.
        delta: between 0 and 1.

    Raises:
        ConfigError: a number is out of range.

    Source: Balle and Wang 2018, arXiv:1805.06530, theorem 8.
    """
    if not noise_multiplier >= 0.0 or not 0.0 < delta < 1.0:
        raise ConfigError(
            f"noise must be at least 0 and delta between 0 and 1, got {noise_multiplier}, {delta}"
        )
    if noise_multiplier == 0.0:
        return math.inf
    low, high = 0.0, 1.0
    if _gaussian_delta(0.0, noise_multiplier) <= delta:
        return 0.0
    while _gaussian_delta(high, noise_multiplier) > delta:
        low, high = high, 2.0 * high
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        if _gaussian_delta(middle, noise_multiplier) > delta:
            low = middle
        else:
            high = middle
    return high


def _gaussian_delta(epsilon: float, sigma: float) -> float:
    """exp(e) Phi(-z) is written through ln Phi, because exp(e) alone overflows for large e."""
    first = 0.5 * math.erfc(-(0.5 / sigma - epsilon * sigma) / math.sqrt(2.0))
    return first - math.exp(min(0.0, epsilon + _log_normal_tail(0.5 / sigma + epsilon * sigma)))


def _log_normal_tail(z: float) -> float:
    """Ln Phi(-z); beyond z = 30 by its asymptotic series, whose next term, 15 / z^6, is below 1e-7 there."""
    if z < 30.0:
        return math.log(0.5 * math.erfc(z / math.sqrt(2.0)))
    return -0.5 * z * z - math.log(z * math.sqrt(2.0 * math.pi)) + math.log1p(-1.0 / z**2 + 3.0 / z**4)
