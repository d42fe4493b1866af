"""A model of one person's movement and of the sensor they wear.

Body frame: x forward, y left, z up; accelerations in m/s^2, angles in rad. A gait is a Fourier series over the
stride (two steps), so its second harmonic is the step frequency, with own coefficients for each activity and for
each person's style. The trunk's pitch and roll are a posture plus an oscillation of the gait; gravity is projected
through them, and their derivative is what a gyroscope sees. The sensor adds placement (a rotation), gain, bias,
noise and jitter of its clock.

Activities are numbered as in ``wearfleet_protos.labels.SIMULATED6``; the first three are gaits.
The numbers are our own choices, in the range of published waist recordings; they are not fitted to any data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Person", "Sensor", "body_signals", "draw_person", "draw_sensor", "measure"]

GRAVITY: Final = 9.80665
HARMONICS: Final = 6

# Amplitudes of harmonics 1..6 of the stride, (axis x y z, harmonic), m/s^2, before effort and style.
_GAIT: Final = np.array(
    [
        [[0.3, 1.5, 0.3, 0.7, 0.1, 0.3], [1.0, 0.2, 0.6, 0.1, 0.2, 0.1], [0.2, 2.6, 0.2, 0.8, 0.1, 0.4]],
        [[0.5, 1.6, 0.4, 0.4, 0.1, 0.1], [1.2, 0.2, 0.5, 0.1, 0.1, 0.1], [0.3, 2.4, 0.2, 0.5, 0.1, 0.1]],
        [[0.4, 1.3, 0.4, 1.0, 0.2, 0.6], [0.9, 0.3, 0.7, 0.2, 0.3, 0.2], [0.3, 2.8, 0.4, 1.3, 0.2, 0.8]],
    ]
)
# Oscillation of pitch, roll and yaw of the trunk over the stride, rad, harmonics 1..6.
_SWAY: Final = np.array(
    [[0.010, 0.035, 0, 0.006, 0, 0], [0.045, 0.008, 0.010, 0, 0, 0], [0.070, 0.010, 0.012, 0, 0, 0]]
)
_STEP_RATE: Final = np.array([1.00, 0.88, 1.04])  # of the person's walking rate
_EFFORT: Final = np.array([1.00, 0.92, 1.18])


@dataclass(frozen=True, slots=True, eq=False)
class Person:
    """What makes a wearer different from others.

    Args:
        step_hz: (3,) steps a second in each gait.
        gait: (3, 3, 6) complex m/s^2, coefficients of gait, axis, harmonic.
        sway: (3, 3, 6) complex rad, of gait, angle (pitch, roll, yaw), harmonic.
        posture: (6, 2) rad, pitch and roll in each activity.
        restlessness: movements a second while at rest.
    """

    step_hz: NDArray[np.float64]
    gait: NDArray[np.complex128]
    sway: NDArray[np.complex128]
    posture: NDArray[np.float64]
    restlessness: float


@dataclass(frozen=True, slots=True, eq=False)
class Sensor:
    """How a device sits on the body and what it does to the signal.

    Args:
        rotation: (3, 3) body to sensor.
        gain: (6,) of accelerometer and gyroscope axes.
        bias: (6,) m/s^2 and rad/s.
        noise: (6,) standard deviation, m/s^2 and rad/s.
        jitter_s: standard deviation of the sampling instants.
    """

    rotation: NDArray[np.float64]
    gain: NDArray[np.float64]
    bias: NDArray[np.float64]
    noise: NDArray[np.float64]
    jitter_s: float


def draw_person(generator: np.random.Generator) -> Person:
    """Draw a person; style, tempo, strength and posture differ, so that classes of different people overlap."""
    strength = np.exp(generator.normal(0.0, 0.16))
    rate = generator.normal(1.85, 0.12)
    tempo = _STEP_RATE * np.exp(generator.normal(0.0, 0.03, 3))
    effort = _EFFORT * strength * np.exp(generator.normal(0.0, 0.07, 3))
    phases = np.exp(1j * np.cumsum(np.full(HARMONICS, 0.7)))  # a common shape of the step
    # One style for all gaits of a person and a smaller part of each gait alone.
    style = _complex_normal(generator, (1, 3, HARMONICS), 0.25) + _complex_normal(
        generator, (3, 3, HARMONICS), 0.15
    )
    sway_style = _complex_normal(generator, (3, 3, HARMONICS), 0.35)
    return Person(
        step_hz=rate * tempo,
        gait=effort[:, None, None] * _GAIT * phases * (1.0 + style),
        sway=effort[:, None, None] * _SWAY * phases * (1.0 + sway_style),
        posture=_draw_posture(generator),
        restlessness=float(generator.uniform(0.03, 0.15)),
    )


def _draw_posture(generator: np.random.Generator) -> NDArray[np.float64]:
    """(6, 2) pitch and roll, rad: sitting leans back from the person's own way of standing."""
    upright = np.radians(generator.normal(0.0, [8.0, 5.0]))
    gaits = (
        upright
        + np.radians([[3.0, 0.0], [9.0, 0.0], [-1.0, 0.0]])
        + np.radians(generator.normal(0.0, 2.5, (3, 2)))
    )
    sitting = upright + np.radians([generator.normal(-24.0, 6.5), generator.normal(0.0, 5.0)])
    lying = np.radians([generator.normal(-82.0, 9.0), generator.normal(0.0, 25.0)])
    return np.vstack((gaits, sitting, upright, lying))


def _complex_normal(
    generator: np.random.Generator, shape: tuple[int, ...], scale: float
) -> NDArray[np.complex128]:
    drawn: NDArray[np.complex128] = generator.normal(size=shape) + 1j * generator.normal(size=shape)
    drawn *= scale / np.sqrt(2.0)
    return drawn


def draw_sensor(generator: np.random.Generator, jitter_s: float) -> Sensor:
    """Draw a device and how it is worn."""
    yaw, pitch, roll = np.radians(generator.normal(0.0, [18.0, 6.0, 6.0]))
    return Sensor(
        rotation=rotation(yaw, pitch, roll),
        gain=1.0 + generator.normal(0.0, 0.02, 6),
        bias=generator.normal(0.0, [0.12, 0.12, 0.12, 0.02, 0.02, 0.02]),
        noise=np.repeat(generator.uniform([0.04, 0.008], [0.14, 0.03]), 3),
        jitter_s=jitter_s,
    )


def rotation(yaw: float, pitch: float, roll: float) -> NDArray[np.float64]:
    """(3, 3) rotation about z, then y, then x."""
    cz, sz, cy, sy, cx, sx = (
        np.cos(yaw),
        np.sin(yaw),
        np.cos(pitch),
        np.sin(pitch),
        np.cos(roll),
        np.sin(roll),
    )
    about_z = np.array([[cz, -sz, 0.0], [sz, cz, 0.0], [0.0, 0.0, 1.0]])
    about_y = np.array([[cy, 0.0, sy], [0.0, 1.0, 0.0], [-sy, 0.0, cy]])
    about_x = np.array([[1.0, 0.0, 0.0], [0.0, cx, -sx], [0.0, sx, cx]])
    turned: NDArray[np.float64] = about_x @ about_y @ about_z
    return turned


def body_signals(
    person: Person,
    activity: NDArray[np.int64],
    blend: NDArray[np.float64],
    *,
    rate_hz: float,
    instants: NDArray[np.float64],
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """What an ideal sensor in the body frame would measure.

    Args:
        person: who.
        activity: (T,) class that each sample belongs to or leads to.
        blend: (T, 6) weight of each activity at each sample, rows sum to 1 (soft in transitions).
        rate_hz: samples a second.
        instants: (T,) s, deviation of each sampling instant from the regular grid.
        generator: for tempo, restlessness and slow posture changes.

    Returns:
        (T, 6) acceleration with gravity, m/s^2, and angular velocity, rad/s.
    """
    step_hz = np.concatenate((person.step_hz, np.full(3, person.step_hz[0])))[activity]
    stride_hz = 0.5 * step_hz * (1.0 + 0.05 * _slow_noise(generator, len(activity), rate_hz, 2.0))
    phase = 2.0 * np.pi * (np.cumsum(stride_hz) / rate_hz + stride_hz * instants)
    waves = np.exp(1j * np.outer(phase, np.arange(1, HARMONICS + 1)))  # (T, harmonics)
    effort = np.exp(0.15 * _slow_noise(generator, len(activity), rate_hz, 4.0))[:, None]
    gait = blend[:, :3]
    linear = effort * np.einsum("tg,gah,th->ta", gait, person.gait, waves, optimize=True).real
    angles = effort * np.einsum("tg,gah,th->ta", gait, person.sway, waves, optimize=True).real
    at_rest = 1.0 - gait.sum(axis=1, keepdims=True)
    linear += at_rest * _fidgets(person, len(activity), rate_hz, generator)
    drift = [np.radians(3.0) * _slow_noise(generator, len(activity), rate_hz, 8.0) for _ in range(2)]
    angles[:, :2] += blend @ person.posture + np.stack(drift, axis=1)
    pitch, roll = angles[:, 0], angles[:, 1]
    gravity = GRAVITY * np.stack(
        (-np.sin(pitch), np.cos(pitch) * np.sin(roll), np.cos(pitch) * np.cos(roll)), axis=1
    )
    turning = np.gradient(angles, 1.0 / rate_hz, axis=0)[:, [1, 0, 2]]  # about x: roll, y: pitch, z: yaw
    return np.hstack((linear + gravity, turning))


def _slow_noise(
    generator: np.random.Generator, count: int, rate_hz: float, seconds: float
) -> NDArray[np.float64]:
    """(count,) unit-variance noise that changes over ``seconds``: random knots, linear in between."""
    knots = max(int(count / rate_hz / seconds) + 2, 2)
    values = generator.normal(size=knots)
    smooth: NDArray[np.float64] = np.interp(np.linspace(0.0, knots - 1.0, count), np.arange(knots), values)
    return smooth


def _fidgets(
    person: Person, count: int, rate_hz: float, generator: np.random.Generator
) -> NDArray[np.float64]:
    """(count, 3) m/s^2: breathing and short restless movements."""
    time = np.arange(count) / rate_hz
    moves = np.zeros((count, 3))
    moves[:, 0] = 0.04 * np.sin(2.0 * np.pi * 0.27 * time + generator.uniform(0.0, 6.28))
    length = int(0.6 * rate_hz)
    burst = np.hanning(length)[:, None] * np.sin(2.0 * np.pi * 2.5 * np.arange(length) / rate_hz)[:, None]
    number = generator.poisson(person.restlessness * count / rate_hz)
    for start in generator.integers(0, max(count - length, 1), number):
        moves[start : start + length] += (burst * generator.normal(0.0, 0.7, 3))[: count - start]
    return moves


def measure(sensor: Sensor, body: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float32]:
    """Turn (T, 6) ideal body-frame signals into (T, 6) float32 readings of a sensor."""
    turned = np.hstack((body[:, :3] @ sensor.rotation.T, body[:, 3:] @ sensor.rotation.T))
    noisy = turned * sensor.gain + sensor.bias + generator.normal(size=body.shape) * sensor.noise
    return noisy.astype(np.float32)
