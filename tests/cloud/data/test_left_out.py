"""Activities that are left out are gone, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.left_out import leave_out
from wearfleet_cloud.data.prepared import Prepared, prepare
from wearfleet_cloud.data.scenarios import build_scenario
from wearfleet_protos.errors import ConfigError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    cache: Path = tmp_path_factory.mktemp("cache")
    return prepare(dataset_named("simulator"), None, cache)


def test_the_windows_of_the_other_activities_stay_under_their_names(prepared: Prepared) -> None:
    names = prepared.dataset.label_names
    rest = leave_out(prepared, [names[1]])
    kept = prepared.windows.activity != 1
    assert rest.dataset.label_names == (names[0], *names[2:])
    assert rest.dataset.other_labels[0] == names[1]
    np.testing.assert_array_equal(rest.windows.x, prepared.windows.x[kept])
    before = [names[k] for k in prepared.windows.activity[kept]]
    assert [rest.dataset.label_names[k] for k in rest.windows.activity] == before
    np.testing.assert_array_equal(rest.windows.start, prepared.windows.start[kept])
    assert rest.labels.max() == len(names) - 2
    assert (rest.labels[np.asarray(prepared.labels) == 1] == -1).all()


def test_scenarios_are_built_of_the_rest_as_of_any_data_set(prepared: Prepared) -> None:
    names = prepared.dataset.label_names
    scenario = build_scenario("cross-person", leave_out(prepared, names[:1]), 0)
    assert scenario.target.y.max() == len(names) - 2


def test_leaving_nothing_out_changes_nothing(prepared: Prepared) -> None:
    assert leave_out(prepared, []) is prepared


def test_what_cannot_be_left_out_is_refused(prepared: Prepared) -> None:
    names = prepared.dataset.label_names
    with pytest.raises(ConfigError, match=f"no activity yodel; it has: {names[0]}"):
        leave_out(prepared, ["yodel"])
    with pytest.raises(ConfigError, match="at least two activities"):
        leave_out(prepared, names[1:])
