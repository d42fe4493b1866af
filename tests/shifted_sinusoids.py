"""Simulated windows with a shift between domains that is known: three sources and a target (specs/ood.md 7, T16).

A class is a frequency and a pattern of harmonics, which every domain shows alike. A domain turns each triad of axes,
scales and offsets each channel and jitters the instants of sampling. One more channel tells the class in nine, eight
and seven of ten source windows, and in one of ten of the target: who trusts it fails there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from numpy.typing import NDArray

AGREEMENT: Final = (0.9, 0.8, 0.7, 0.1)
"""Share of windows whose spurious channel tells the class, by domain; the last is the target."""

FREQUENCIES_HZ: Final = (2.0, 3.0, 4.5)
HARMONICS: Final = ((1.0, 0.5, 0.0), (1.0, 0.0, 0.5), (1.0, 0.3, 0.3))
RATE_HZ: Final = 32.0
TRIADS: Final = 2
CHANNELS: Final = 3 * TRIADS + 1
SPURIOUS: Final = CHANNELS - 1

_AXES: Final = np.array([1.0, 0.6, 0.3])
_MAX_GAIN: Final = 1.5  # and its inverse
_OFFSET: Final = 0.5
_JITTER: Final = 0.2  # of the time between two samples


@dataclass(frozen=True, slots=True, eq=False)
class ShiftedDomain:
    """Windows ``x`` (N, 7, T) float32 and classes ``y`` (N,) int64, and how the domain was made of them.

    ``rotations`` (2, 3, 3), ``gain`` and ``offset`` (6,) are those of the inertial channels; ``told`` (N,) is the class
    that the spurious channel tells.
    """

    name: str
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    told: NDArray[np.int64]
    rotations: NDArray[np.float64]
    gain: NDArray[np.float64]
    offset: NDArray[np.float64]


def shifted_sinusoids(
    *, windows: int = 60, length: int = 64, noise: float = 1.0, seed: int = 0
) -> tuple[ShiftedDomain, ...]:
    """Three source domains, then the target.

    Args:
        windows: of each class in each domain; a multiple of 10, so that the agreement is exact.
        length: T, samples at 32 Hz.
        noise: standard deviation of the noise of every channel; the fundamental has amplitude 1. At 2 the frequencies
            still tell nine of ten classes, but a network learns the spurious channel first.
        seed: of everything random.
    """
    names = (*(f"source {k}" for k in range(len(AGREEMENT) - 1)), "target")
    return tuple(
        _domain(name, share, windows, length, noise, np.random.default_rng((seed, number)))
        for number, (name, share) in enumerate(zip(names, AGREEMENT, strict=True))
    )


def _domain(
    name: str, share: float, windows: int, length: int, noise: float, random: np.random.Generator
) -> ShiftedDomain:
    classes = len(FREQUENCIES_HZ)
    y = np.repeat(np.arange(classes), windows)
    rotations = Rotation.random(TRIADS, rng=random).as_matrix()
    gain = _MAX_GAIN ** random.uniform(-1.0, 1.0, 3 * TRIADS)
    offset = random.uniform(-_OFFSET, _OFFSET, 3 * TRIADS)
    waves = _waves(y, length, random)  # (N, triad, T)
    axes = np.einsum("gij,j,ngt->ngit", rotations, _AXES, waves).reshape(len(y), 3 * TRIADS, length)
    told = _told(y, round(share * windows), random)
    level = np.repeat((told - (classes - 1) / 2)[:, None, None], length, axis=2)
    x = np.concatenate((axes * gain[:, None] + offset[:, None], level), axis=1)
    x += random.normal(0.0, noise, x.shape)
    return ShiftedDomain(name, x.astype(np.float32), y, told, rotations, gain, offset)


def _waves(y: NDArray[np.int64], length: int, random: np.random.Generator) -> NDArray[np.float64]:
    """(N, triads, T): sums of harmonics with random phases, at jittered instants."""
    instants = (np.arange(length) + random.uniform(-_JITTER, _JITTER, (len(y), 1, length))) / RATE_HZ
    waves = np.zeros((len(y), TRIADS, length))
    for order, amplitude in enumerate(np.array(HARMONICS)[y].T, start=1):
        phase = random.uniform(0.0, 2 * np.pi, (len(y), TRIADS, 1))
        angle = 2 * np.pi * order * np.array(FREQUENCIES_HZ)[y][:, None, None] * instants + phase
        waves += amplitude[:, None, None] * np.sin(angle)
    return waves


def _told(y: NDArray[np.int64], right: int, random: np.random.Generator) -> NDArray[np.int64]:
    """The class that the spurious channel tells: the true one in ``right`` windows of a class, else another."""
    classes = len(FREQUENCIES_HZ)
    told = (y + random.integers(1, classes, len(y))) % classes
    for label in range(classes):
        chosen = random.permutation(np.flatnonzero(y == label))[:right]
        told[chosen] = label
    return told
