"""The simulated people: reproducible, plausible, different from each other, and learnable to the degree promised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from wearfleet_cloud.data import DATASETS
from wearfleet_cloud.data.dataset import silent
from wearfleet_cloud.data.prepared import prepare
from wearfleet_cloud.data.scenarios import cross_person, split_sources
from wearfleet_cloud.data.simulator import Simulation, simulated_dataset
from wearfleet_cloud.data.standardisation import standardisation_of
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.labels import SIMULATED6
from wearfleet_protos.recording import Recording
from wearfleet_protos.windowing import LabelledWindows, split_by_time

SMALL = Simulation(persons=3, sessions=2, bouts=1, bout_s=20.0)


def simulate(simulation: Simulation) -> list[Recording]:
    return list(simulation.read(None, silent))


def samples_of(recording: Recording, activity: str) -> np.ndarray:
    return recording.samples[recording.labels == SIMULATED6.index(activity)].astype(np.float64)


def test_the_same_seed_gives_the_same_people_and_another_seed_others() -> None:
    for one, same in zip(simulate(SMALL), simulate(SMALL), strict=True):
        np.testing.assert_array_equal(one.samples, same.samples)
    assert not np.array_equal(simulate(SMALL)[0].samples, simulate(replace(SMALL, seed=1))[0].samples)


def test_a_person_does_not_depend_on_how_many_there_are() -> None:
    alone = simulate(replace(SMALL, persons=1))
    np.testing.assert_array_equal(alone[1].samples, simulate(SMALL)[1].samples)


def test_everybody_has_two_sessions_with_every_activity_and_unlabelled_transitions() -> None:
    recordings = simulate(SMALL)
    assert [(r.subject, r.session) for r in recordings[:3]] == [
        ("01", "day-1"),
        ("01", "day-2"),
        ("02", "day-1"),
    ]
    for recording in recordings:
        assert np.bincount(recording.labels + 1).tolist() == [6 * 125] + [1000] * 6
    assert DATASETS["simulator"].simulated
    assert {r.device for r in recordings} == {"simulated"}


def test_gravity_is_measured_at_rest_and_the_gyroscope_rests() -> None:
    for recording in simulate(SMALL):
        for activity in ("sitting", "standing", "lying"):
            still = samples_of(recording, activity)
            assert np.linalg.norm(still[:, :3].mean(axis=0)) == pytest.approx(
                9.81, abs=0.95
            )  # 3 sd of gain and bias
            assert np.abs(still[:, 3:].mean(axis=0)).max() < 0.1


def test_the_vertical_signal_of_walking_beats_at_a_human_step_rate() -> None:
    for recording in simulate(SMALL):
        norm = np.linalg.norm(samples_of(recording, "walking")[:, :3], axis=1)
        spectrum = np.abs(np.fft.rfft(norm - norm.mean()))
        peak = np.fft.rfftfreq(len(norm), 1 / 50.0)[spectrum.argmax()]
        assert 0.7 < peak < 4.6  # a stride, a step, or two steps
        assert norm.std() > 3 * np.linalg.norm(samples_of(recording, "standing")[:, :3], axis=1).std()


def test_angular_velocity_is_the_rotation_of_gravity() -> None:
    """Without gait, noise and placement the two sensors must agree: d(gravity)/dt = gravity x omega."""
    from wearfleet_cloud.data.simulated_person import body_signals, draw_person

    person = replace(
        draw_person(np.random.default_rng(0)), gait=np.zeros((3, 3, 6), complex), restlessness=0.0
    )
    activity, blend = np.zeros(1000, np.int64), np.tile(np.eye(6)[0], (1000, 1))
    signals = body_signals(
        person, activity, blend, rate_hz=50.0, instants=np.zeros(1000), generator=np.random.default_rng(1)
    )
    gravity, omega = signals[:, :3], signals[:, 3:]
    np.testing.assert_allclose(np.linalg.norm(gravity, axis=1), 9.80665, rtol=1e-9)
    change = np.gradient(gravity, 1 / 50.0, axis=0)[5:-5]
    predicted = np.cross(gravity, omega)[5:-5]
    assert np.abs(change - predicted).std() < 0.25 * np.abs(change).std()


def test_label_noise_changes_labels_of_whole_bouts_and_nothing_else() -> None:
    clean, noisy = simulate(SMALL), simulate(replace(SMALL, label_noise=1.0))
    for one, other in zip(clean, noisy, strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)
        np.testing.assert_array_equal(one.labels == -1, other.labels == -1)
        assert not np.any((one.labels == other.labels) & (one.labels >= 0))
        assert np.count_nonzero(np.diff(other.labels[other.labels >= 0])) <= 5


@pytest.mark.parametrize(
    "bad", [{"persons": 0}, {"bout_s": 1.0}, {"label_noise": 1.5}, {"jitter_s": 0.5}, {"seed": -1}]
)
def test_senseless_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        replace(SMALL, **bad)


@pytest.mark.slow
def test_new_people_cost_accuracy_and_personal_training_wins_it_back(tmp_path: Path) -> None:
    """The point of the simulator. Bounds are far wider than the spread over groups (0.75 to 0.90 when written)."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    prepared = prepare(simulated_dataset(Simulation(persons=12)), None, tmp_path)
    scenario = cross_person(prepared, 1)
    split = split_sources(scenario)
    mean, std = standardisation_of([domain.x for domain in split.train])

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((x - mean[:, None]) / std[:, None])

    layers = [
        nn.Conv1d(6, 16, 9),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 9),
        nn.ReLU(),
        nn.MaxPool1d(2),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 26, 6))

    def train(x: np.ndarray, y: np.ndarray, steps: int, rate: float) -> None:
        inputs, targets = tensor(x), torch.from_numpy(y)
        optimiser = torch.optim.Adam(model.parameters(), rate)
        for _ in range(steps):
            batch = torch.randint(len(inputs), (64,))
            loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    def accuracy(x: np.ndarray, y: np.ndarray) -> float:
        with torch.no_grad():
            return float((model(tensor(x)).argmax(1).numpy() == y).mean())

    train(np.concatenate([d.x for d in split.train]), np.concatenate([d.y for d in split.train]), 400, 1e-3)
    known = accuracy(
        np.concatenate([d.x for d in split.validation]), np.concatenate([d.y for d in split.validation])
    )
    unseen = accuracy(scenario.target.x, scenario.target.y)
    assert known > 0.93
    assert 0.6 < unseen < 0.95
    assert unseen < known - 0.03
    general = {name: value.clone() for name, value in model.state_dict().items()}
    before, after = [], []
    for subject in scenario.target.subjects:
        own, later = split_by_time(prepared.recordings_of(subject), prepared.dataset.spec, 0.4)
        model.load_state_dict(general)
        before.append(accuracy(later.x, later.y))
        personalise(train, own)
        after.append(accuracy(later.x, later.y))
    assert np.mean(after) > np.mean(before) + 0.03


def personalise(train, own: LabelledWindows) -> None:
    train(own.x, own.y, 60, 1e-3)
