"""The descriptions are those of the benchmark's tables (specs/ood.md 1.2, 1.4 and 3.5; T14 of section 7)."""

from __future__ import annotations

import pytest
import torch
from wearfleet_cloud.data import DATASETS
from wearfleet_models import ModelSpec, build_classifier

TABLE = [
    # name, scenario, Hz, channels, window, classes, kernel, features of the medium CNN
    ("dsads", "cross-person", 25, 45, 125, 19, 9, 800),
    ("dsads", "cross-position", 25, 9, 125, 19, 9, 800),
    ("dsads", "cross-device", 25, 15, 125, 19, 5, 896),
    ("usc-had", "cross-person", 100, 6, 200, 12, 6, 1472),
    ("uci-har", "cross-person", 50, 6, 128, 6, 9, 832),
    ("hapt", "cross-person", 50, 6, 128, 6, 9, 832),  # in place of UCI-HAR
    ("pamap2", "cross-person", 100, 27, 200, 12, 9, 1408),
    ("pamap2", "cross-position", 100, 9, 200, 12, 9, 1408),
    ("emg", "cross-person", 1000, 8, 200, 6, 9, 1408),
    ("wesad", "cross-person", 33, 8, 200, 4, 9, 1408),
    ("har-common", "cross-dataset", 25, 6, 50, 6, 6, 256),
    ("har-common-strict", "cross-dataset", 25, 6, 50, 6, 6, 256),
    ("dsads-ddlearn", "cross-person", 25, 45, 125, 19, 9, 800),
    ("pamap2-ddlearn", "cross-person", 100, 27, 512, 8, 9, 3904),
]


@pytest.mark.parametrize(
    ("name", "scenario", "rate", "channels", "window", "classes", "kernel", "features"), TABLE
)
def test_shapes_rates_and_features_are_those_of_the_tables(
    name: str, scenario: str, rate: int, channels: int, window: int, classes: int, kernel: int, features: int
) -> None:
    dataset = DATASETS[name].for_scenario(scenario)
    assert (dataset.rate_hz, len(dataset.channels), dataset.window) == (rate, channels, window)
    assert (len(dataset.label_names), dataset.kernel) == (classes, kernel)
    network = build_classifier(ModelSpec("cnn", channels, window, classes, kernel=dataset.kernel))
    assert network.features(torch.zeros(2, channels, window)).shape == (2, features)


GROUPS = {
    # the benchmark's person groups, with its ids counted from 0, and the name of each id
    "dsads": (((0, 1), (2, 3), (4, 5), (6, 7)), lambda n: f"{n + 1}"),
    "usc-had": (((1, 11, 2, 0), (6, 3, 9, 5), (7, 13, 8, 10), (4, 12)), lambda n: f"{n + 1:02d}"),
    "uci-har": (tuple(tuple(range(a, a + 6)) for a in range(0, 30, 6)), lambda n: f"{n + 1:02d}"),
    "hapt": (tuple(tuple(range(a, a + 6)) for a in range(0, 30, 6)), lambda n: f"{n + 1:02d}"),
    "pamap2": (((3, 2, 8), (1, 5), (0, 7), (4, 6)), lambda n: f"{n + 101}"),
    "emg": (tuple(tuple(range(a, a + 9)) for a in range(0, 36, 9)), lambda n: f"{n + 1:02d}"),
    "wesad": (
        ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14)),
        [f"{n:02d}" for n in (*range(2, 12), *range(13, 18))].__getitem__,
    ),
    "dsads-ddlearn": (((0, 1), (2, 3), (4, 5), (6, 7)), lambda n: f"{n + 1}"),
    "usc-had-ddlearn": (((1, 3, 10), (2, 5, 13), (4, 7, 9), (6, 8, 14), (11, 12)), lambda n: f"{n:02d}"),
    "pamap2-ddlearn": (((1, 2), (3, 4), (5, 6), (7, 8)), lambda n: f"{n + 100}"),
}


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_person_groups_are_those_of_the_tables(name: str) -> None:
    groups, subject = GROUPS[name]
    assert DATASETS[name].domain_groups == tuple(tuple(map(subject, group)) for group in groups)


def test_cross_dataset_has_the_members_in_the_order_of_the_benchmark() -> None:
    for name in ("har-common", "har-common-strict"):
        assert DATASETS[name].members == ("dsads", "usc-had", "hapt", "pamap2")


def test_ddlearn_windows_and_strides() -> None:
    cut = {
        name: (DATASETS[name].window, DATASETS[name].stride) for name in DATASETS if name.endswith("-ddlearn")
    }
    assert cut == {"dsads-ddlearn": (125, 62), "usc-had-ddlearn": (500, 250), "pamap2-ddlearn": (512, 256)}
    labels = DATASETS["pamap2"].label_names
    numbers = (1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 17, 24)
    chosen = [numbers[labels.index(name)] for name in DATASETS["pamap2-ddlearn"].label_names]
    assert chosen == [1, 2, 3, 4, 12, 13, 16, 17]
