"""Cross-person scenarios, and standardisation from source training windows only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from wearfleet_cloud.data.dataset import UNKNOWN_SUBJECT
from wearfleet_cloud.data.prepared import Prepared, prepare
from wearfleet_cloud.data.scenarios import cross_person, person_groups, split_sources
from wearfleet_cloud.data.simulator import Simulation, simulated_dataset
from wearfleet_cloud.data.standardisation import STANDARDISATIONS, ranges_of, standardisation_of, untouched
from wearfleet_cloud.data.three_way import three_way
from wearfleet_protos.errors import ConfigError, DataError, NotFoundError, ShapeError


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    dataset = simulated_dataset(Simulation(persons=6, sessions=1, bouts=1, bout_s=20.0))
    dataset = replace(dataset, domain_groups=(("02", "01"), ("05", "77")))
    return prepare(dataset, None, tmp_path_factory.mktemp("cache"))


def test_everybody_is_in_one_group_even_outside_the_defined_ones(people: Prepared) -> None:
    assert person_groups(people) == (("02", "01"), ("05",), ("03", "04", "06"))


def test_without_groups_consecutive_subjects_form_domains(people: Prepared) -> None:
    plain = replace(people, dataset=replace(people.dataset, domain_groups=(), group_size=4))
    assert person_groups(plain) == (("01", "02", "03", "04"), ("05", "06"))


def test_the_target_group_is_held_out_and_the_rest_are_sources(people: Prepared) -> None:
    scenario = cross_person(people, 1)
    assert scenario.target.subjects == ("05",)
    assert [d.subjects for d in scenario.sources] == [("02", "01"), ("03", "04", "06")]
    assert sum(len(d) for d in (*scenario.sources, scenario.target)) == len(people.windows)
    np.testing.assert_array_equal(scenario.target.x, people.windows.x[people.windows.subject == "05"])
    np.testing.assert_array_equal(scenario.target.y, people.windows.activity[people.windows.subject == "05"])


def test_any_subjects_can_be_held_out(people: Prepared) -> None:
    scenario = cross_person(people, ("01", "05"))
    assert [d.subjects for d in scenario.sources] == [("02",), ("03", "04", "06")]
    assert set(people.windows.subject[scenario.target.index]) == {"01", "05"}


def test_impossible_targets_are_refused(people: Prepared) -> None:
    with pytest.raises(ConfigError, match="groups 0 to 2, got target 3"):
        cross_person(people, 3)
    with pytest.raises(ConfigError, match="got target -1"):
        cross_person(people, -1)
    with pytest.raises(NotFoundError, match="99"):
        cross_person(people, ("01", "99"))
    with pytest.raises(NotFoundError):
        cross_person(people, ())
    with pytest.raises(DataError, match="all persons"):
        cross_person(people, people.windows.subjects())


def test_unknown_wearers_cannot_be_told_apart(people: Prepared) -> None:
    nameless = replace(people.windows, subject=np.full(len(people.windows), UNKNOWN_SUBJECT))
    with pytest.raises(DataError, match="subject files"):
        cross_person(replace(people, windows=nameless), 0)


@pytest.mark.parametrize("rule", ["block", "stratified"])
def test_sources_split_into_parts_that_belong_to_them(people: Prepared, rule: str) -> None:
    scenario = cross_person(people, 1, seed=3)
    split = split_sources(scenario, rule)
    for domain, train, validation in zip(scenario.sources, split.train, split.validation, strict=True):
        assert train.subjects == validation.subjects == domain.subjects
        assert set(train.index) | set(validation.index) <= set(domain.index)
        assert 0.1 < len(validation) / len(domain) < 0.3
        np.testing.assert_array_equal(train.x, people.windows.x[train.index])
        np.testing.assert_array_equal(validation.y, people.windows.activity[validation.index])
    assert (split.leaking == 0) == (rule == "block")


def test_a_target_part_is_the_last_of_a_three_way_split_and_the_sources_stay_whole(people: Prepared) -> None:
    part = replace(people, dataset=replace(people.dataset, target_part=0.2))
    tested = set()
    for seed in (1, 2, 3):
        whole, scenario = cross_person(people, 1, seed), cross_person(part, 1, seed)
        kept = whole.target.index[three_way(whole.target.y, 0.2, seed)[2]]
        np.testing.assert_array_equal(scenario.target.index, kept)
        np.testing.assert_array_equal(scenario.target.x, people.windows.x[kept])
        np.testing.assert_array_equal(scenario.target.y, people.windows.activity[kept])
        assert [len(d) for d in scenario.sources] == [len(d) for d in whole.sources]
        tested.add(tuple(kept.tolist()))
    assert len(tested) == 3


def test_splitting_by_person_needs_domains_of_several_people(people: Prepared) -> None:
    with pytest.raises(DataError, match="at least two known persons"):
        split_sources(cross_person(people, 0), "person")
    split = split_sources(cross_person(people, ("05",)), "person")
    train, validation = (
        set(people.windows.subject[np.concatenate([d.index for d in part])])
        for part in (split.train, split.validation)
    )
    assert not train & validation


def test_an_unknown_rule_names_the_known_ones(people: Prepared) -> None:
    with pytest.raises(ConfigError, match="block, person, stratified"):
        split_sources(cross_person(people, 0), "random")


def test_standardisation_equals_the_moments_of_all_samples_together() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.normal(5.0, 3.0, (n, 2, 7)).astype(np.float32) for n in (3, 1, 5)]
    mean, std = standardisation_of(parts)
    together = np.concatenate(parts).transpose(1, 0, 2).reshape(2, -1).astype(np.float64)
    np.testing.assert_allclose(mean, together.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(std, together.std(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(standardisation_of(np.concatenate(parts))[1], std)


def test_standardisation_survives_a_large_offset_and_a_constant_channel() -> None:
    x = np.zeros((4, 2, 8), np.float32)
    x[:, 0] = 1000.0 + np.tile([-0.5, 0.5], 4)
    x[:, 1] = 42.0
    mean, std = standardisation_of(x)
    np.testing.assert_allclose(mean, [1000.0, 42.0])
    np.testing.assert_allclose(std, [0.5, 1.0], rtol=1e-5)


def test_ranges_bring_training_windows_to_0_to_1_and_a_constant_channel_to_0() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.normal(5.0, 3.0, (n, 3, 7)).astype(np.float32) for n in (3, 0, 5)]
    for part in parts:
        part[:, 2] = 42.0
    low, span = ranges_of(parts)
    scaled = (np.concatenate(parts) - low[:, None]) / span[:, None]
    np.testing.assert_array_equal(scaled.min(axis=(0, 2)), [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(scaled.max(axis=(0, 2)), [1.0, 1.0, 0.0])


def test_no_standardisation_leaves_every_bit_of_a_window() -> None:
    x = np.random.default_rng(0).normal(5.0, 3.0, (4, 2, 7)).astype(np.float32)
    mean, std = untouched(x)
    np.testing.assert_array_equal((x - mean[:, None]) / std[:, None], x)


@pytest.mark.parametrize("name", STANDARDISATIONS)
@pytest.mark.parametrize(
    "x",
    [
        [],
        np.zeros((0, 2, 3), np.float32),
        np.zeros((2, 3), np.float32),
    ],
)
def test_a_standardisation_refuses_what_is_no_windows(name: str, x: np.ndarray) -> None:
    with pytest.raises(ShapeError):
        STANDARDISATIONS[name](x)


@pytest.mark.parametrize("fit", [standardisation_of, ranges_of])
def test_a_standardisation_that_is_fitted_refuses_nan(fit) -> None:
    with pytest.raises(ShapeError, match="NaN"):
        fit(np.full((1, 2, 3), np.nan, np.float32))
