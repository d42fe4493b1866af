"""A small simulated scenario that the training tests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from wearfleet_cloud.data.prepared import Prepared, prepare
from wearfleet_cloud.data.scenarios import Scenario, cross_person
from wearfleet_cloud.data.simulator import Simulation, simulated_dataset


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    dataset = simulated_dataset(Simulation(persons=4, sessions=1, bouts=2, bout_s=16.0))
    cache: Path = tmp_path_factory.mktemp("cache")
    return prepare(dataset, None, cache)


@pytest.fixture(scope="session")
def small_people(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Four people, each a domain."""
    simulated = simulated_dataset(Simulation(persons=4, sessions=1, bouts=2, bout_s=16.0))
    return prepare(replace(simulated, group_size=1), None, tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="session")
def small_scenario(small_data: Prepared) -> Scenario:
    return cross_person(small_data, small_data.subjects[:1], seed=3)
