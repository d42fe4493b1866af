"""A data set of three simulated people, small enough for whole benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest
from wearfleet_cloud.training.benchmark import Place

_DATA = """
from dataclasses import replace

from wearfleet_cloud.data.simulator import Simulation, simulated_dataset

DATASET = replace(simulated_dataset(Simulation(persons=3, sessions=1, bouts=2, bout_s=16.0)), group_size=1)
"""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of prepared data."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the data set's file."""
    path = tmp_path_factory.mktemp("people") / "people.py"
    path.write_text(_DATA)
    return str(path)


@pytest.fixture
def place(tmp_path: Path, cache: Path) -> Place:
    return Place(tmp_path / "out", None, cache)
