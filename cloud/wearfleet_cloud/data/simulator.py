"""The simulated data set: people who walk, climb, descend, sit, stand and lie, at 50 Hz, from a seed.

It needs no files, so everything can be tried without data; whatever is made of it says *simulated*. Every person has
two sessions (days) with the sensor put on anew. Between two bouts of activity lie transitions without a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.labels import SIMULATED6, UNLABELLED
from wearfleet_protos.recording import Recording

from wearfleet_cloud.data.dataset import INERTIAL6, Counts, Dataset, Progress
from wearfleet_cloud.data.file_reader import count_recordings
from wearfleet_cloud.data.simulated_person import (
    Sensor,
    body_signals,
    draw_person,
    draw_sensor,
    measure,
    rotation,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SIMULATOR", "Simulation", "simulated_dataset"]

RATE_HZ: Final = 50.0
_TRANSITION_S: Final = 2.5


@dataclass(frozen=True, slots=True)
class Simulation:
    """What is simulated (implements :class:`wearfleet_cloud.data.dataset.Reader`; the data root is not used).

    Person k is the same whatever the number of persons.

    Args:
        persons: how many.
        sessions: days a person.
        bouts: of every activity in a session.
        bout_s: seconds a bout.
        seed: of everything.
        label_noise: share of the bouts that carry another activity's label.
        jitter_s: standard deviation of the sampling instants.

    Raises:
        ConfigError: a number that makes no sense.
    """

    persons: int = 24
    sessions: int = 2
    bouts: int = 2
    bout_s: float = 30.0
    seed: int = 0
    label_noise: float = 0.0
    jitter_s: float = 0.001

    def __post_init__(self) -> None:
        if min(self.persons, self.sessions, self.bouts) < 1 or not self.bout_s >= 5.0 or self.seed < 0:
            raise ConfigError(f"persons, sessions, bouts must be at least 1, bout_s 5, seed 0, got {self}")
        if not 0.0 <= self.label_noise <= 1.0 or not 0.0 <= self.jitter_s <= 0.01:
            raise ConfigError(f"label_noise must be in [0, 1] and jitter_s in [0, 0.01], got {self}")

    def fingerprint(self, root: Path | None) -> str:
        """All settings; the data root plays no part."""
        del root
        return repr(self)

    def read(self, root: Path | None, progress: Progress) -> Iterator[Recording]:
        """One recording a person and session."""
        del root
        for person in range(self.persons):
            for session in range(self.sessions):
                yield _session(self, person, session)
            progress("simulating people", person + 1, self.persons)

    def counts(self, root: Path | None, progress: Progress) -> Counts:
        """Recordings, subjects and samples by label."""
        return count_recordings(self.read(root, progress))


def _session(simulation: Simulation, number: int, session: int) -> Recording:
    own = np.random.default_rng([simulation.seed, number])
    person, sensor = draw_person(own), draw_sensor(own, simulation.jitter_s)
    day = np.random.default_rng([simulation.seed, number, session + 1])
    worn = _put_on_anew(sensor, day)
    activity, blend, in_bout, bout = _schedule(simulation, day)
    instants = day.normal(0.0, worn.jitter_s, len(activity)) if worn.jitter_s else np.zeros(len(activity))
    body = body_signals(person, activity, blend, rate_hz=RATE_HZ, instants=instants, generator=day)
    noise = np.random.default_rng([simulation.seed, number, session + 1, 1])
    stated = _stated(activity[np.unique(bout, return_index=True)[1]], simulation.label_noise, noise)
    return Recording(
        samples=measure(worn, body, day),
        labels=np.where(in_bout, stated[bout], UNLABELLED).astype(np.int16),
        rate_hz=RATE_HZ,
        channels=INERTIAL6,
        subject=f"{number + 1:02d}",
        position="waist",
        device="simulated",
        session=f"day-{session + 1}",
    )


def _put_on_anew(sensor: Sensor, day: np.random.Generator) -> Sensor:
    """The same device, turned by a few degrees."""
    turn = rotation(*np.radians(day.normal(0.0, 3.0, 3)))
    return Sensor(turn @ sensor.rotation, sensor.gain, sensor.bias, sensor.noise, sensor.jitter_s)


def _schedule(
    simulation: Simulation, day: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Bouts in random order.

    Returns:
        (T,) activity, (T, K) soft weights of the activities, (T,) True inside a bout (False in the transition before
        it), (T,) number of the bout.
    """
    order = day.permutation(np.repeat(np.arange(len(SIMULATED6)), simulation.bouts))
    change, stay = round(_TRANSITION_S * RATE_HZ), round(simulation.bout_s * RATE_HZ)
    bout = np.repeat(np.arange(len(order)), change + stay)
    within = np.tile(np.arange(change + stay), len(order))
    before = np.concatenate((order[:1], order[:-1]))
    arrived = np.where(within < change, 0.5 - 0.5 * np.cos(np.pi * within / change), 1.0)[:, None]
    identity = np.eye(len(SIMULATED6))
    blend = arrived * identity[order[bout]] + (1.0 - arrived) * identity[before[bout]]
    return order[bout], blend, within >= change, bout


def _stated(order: NDArray[np.int64], share: float, noise: np.random.Generator) -> NDArray[np.int64]:
    """(bouts,) the label of each bout: the activity, or by chance ``share`` another one."""
    wrong = noise.random(len(order)) < share
    other = (order + noise.integers(1, len(SIMULATED6), len(order))) % len(SIMULATED6)
    return np.where(wrong, other, order)


def simulated_dataset(simulation: Simulation) -> Dataset:
    """The data set of a simulation: windows of 128 samples, 50 % overlap, domains of four persons."""
    return Dataset(
        name="simulator",
        title="Simulated people (no measured data)",
        citation="none: simulated by wearfleet",
        license="none needed: simulated",
        channels=INERTIAL6,
        label_names=SIMULATED6,
        rate_hz=RATE_HZ,
        window=128,
        stride=64,
        reader=simulation,
        group_size=4,
        notes="simulated signals; accuracies on them say nothing about real people",
        simulated=True,
    )


SIMULATOR: Final = simulated_dataset(Simulation())
