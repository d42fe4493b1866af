"""Which channels belong to one kind of sensor, for every data set that is described."""

from __future__ import annotations

import pytest
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.sensor_kinds import sensor_kinds
from wearfleet_cloud.training.trainer import model_spec_for
from wearfleet_protos.recording import Channel

_UNIT = (0,) * 3 + (1,) * 3 + (2,) * 3
"""Accelerometer, gyroscope and magnetometer, three axes each."""


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("hapt", (0, 0, 0, 1, 1, 1)),
        ("usc-had", (0, 0, 0, 1, 1, 1)),
        ("har-common", (0, 0, 0, 1, 1, 1)),
        ("emg", (0,) * 8),
        ("wesad", (0, 0, 0, 1, 2, 3, 4, 5)),  # acceleration, ECG, EMG, EDA, temperature, respiration
        ("dsads", 5 * _UNIT),
        ("pamap2", 3 * _UNIT),
        ("mhealth", (0, 0, 0, 1, 1, *(2 * (0, 0, 0, 2, 2, 2, 3, 3, 3)))),  # chest: acceleration, ECG
    ],
)
def test_channels_of_one_sensor_are_together_wherever_it_is_worn(name: str, kinds: tuple[int, ...]) -> None:
    dataset = dataset_named(name)
    assert sensor_kinds(dataset.channels) == kinds
    assert model_spec_for(dataset, "multimodal-transformer").modalities == kinds
    assert model_spec_for(dataset, "transformer").modalities == ()


def test_a_name_of_one_word_is_a_kind_and_the_unit_does_not_count() -> None:
    channels = [Channel("x", "g"), Channel("ppg_green", "V"), Channel("ppg_red", "V"), Channel("a_x", "V")]
    assert sensor_kinds(channels) == (0, 1, 2, 3)
    mixed = [Channel("acc_x", "g"), Channel("acc_y", "m/s^2")]
    assert sensor_kinds(mixed) == (0, 0)
