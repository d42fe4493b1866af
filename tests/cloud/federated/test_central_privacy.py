"""Central privacy: clipping, noise, the adaptive clip, its durable state, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.small_federation import model, splits
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Averaged, Contribution
from wearfleet_cloud.federated.privacy.central import ClippedMean, fold, next_clip
from wearfleet_cloud.federated.privacy.options import PrivacyOptions
from wearfleet_cloud.federated.simulate import Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import StackedClients
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.privacy import clipped, joint_norm
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

SHAPES = {"a": (30, 40), "b": (7,)}
SPECS = tuple(
    TensorSpec(n, "float32", s, TensorRole.SHARED, TensorGroup.PARAM, "global") for n, s in SHAPES.items()
)
ZEROS = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
NOISELESS = {"dp": "central", "noise_multiplier": 0.0, "clip": "inf"}


def contribution(client: str, update, examples: int = 10) -> Contribution:
    return Contribution(client, examples, lambda: update, 1)


def updates(count: int, seed: int = 0, scale: float = 1.0) -> list[Contribution]:
    generator = np.random.default_rng(seed)
    return [
        contribution(
            f"c{i}",
            {n: (scale * generator.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()},
            int(generator.integers(1, 1000)),
        )
        for i in range(count)
    ]


def folded(given: list[Contribution], options: dict[str, object], state=None, strategy="fedavg") -> Averaged:
    made = create_strategy(strategy, {"dp": "central", "expected_cohort": len(given), **options})
    return fold(made, SPECS, ZEROS, state or {}, given, generator=np.random.default_rng(3))


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_without_noise_and_clip_it_is_the_uniform_mean_to_the_bit(count: int, seed: int) -> None:
    uniform = create_strategy("fedavg", {"weighting": "uniform"})
    expected = uniform.server(SPECS, ZEROS, {}, updates(count, seed)).tensors
    found = folded(updates(count, seed), NOISELESS).tensors
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("strategy", "backbone"),
    [("fedavg", "cnn-plain"), ("fedbn", "cnn"), ("fedadam", "cnn-plain"), ("scaffold", "cnn-plain")],
)
def test_a_federation_without_noise_and_clip_is_the_uniform_one_to_the_bit(
    strategy: str, backbone: str
) -> None:
    parts = {
        name: splits(i, *sizes) for i, (name, sizes) in enumerate({"anna": (45, 21), "ben": (20, 30)}.items())
    }
    clients = tuple(SimulatedClient(n, s["train"], s["holdout"]) for n, s in parts.items())

    def run(options: dict[str, object]):
        made = create_strategy(strategy, {"batch_size": 16, "learning_rate": 0.05, **options})
        start = model(backbone)
        runner = lambda s: StackedClients(s, start, 7)  # noqa: E731
        return simulate(made, start, Population(clients), Simulation(2, seed=7), runner)

    plain, private = run({"weighting": "uniform"}), run({**NOISELESS, "expected_cohort": 2})
    for name, array in plain.tensors.items():
        np.testing.assert_array_equal(private.tensors[name], array)
    assert int(private.state["privacy/rounds"]) == 2
    assert plain.state.keys() == private.state.keys() - {"privacy/rounds"}


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(2, 6),
    seed=st.integers(0, 2**31),
    clip=st.floats(0.01, 100.0),
    scale=st.floats(0.0, 1e6),
)
def test_one_client_moves_the_sum_by_no_more_than_the_clip(
    count: int, seed: int, clip: float, scale: float
) -> None:
    given = updates(count, seed, scale)
    given[0] = replace(given[0], num_examples=10**9)  # what it claims to have gives it no weight
    options = {"noise_multiplier": 0.0, "clip": clip, "expected_cohort": 3}
    with_it, without = folded(given, options).mean.values, folded(given[1:], options).mean.values
    moved = joint_norm({n: with_it[n] - without[n] for n in SHAPES})
    # two means in float64 of sums of at most 6 C: rounding below 12 x 2^-52 of C, far below 1e-9
    assert moved <= clip / 3 * (1 + 1e-9)


def test_clipping_is_joint_and_leaves_zero_and_small_updates_alone() -> None:
    update = {"a": np.full((3,), 3.0, np.float32), "b": np.full((3,), 4.0, np.float32)}
    norm = joint_norm(update)
    assert norm == pytest.approx(5.0 * math.sqrt(3.0), rel=1e-15)
    made = clipped(update, norm, 1.0)
    assert 1.0 - 2.0**-21 <= joint_norm(made) <= 1.0  # shrunk by 2^-22, rounded by at most 2^-24
    assert made["a"][0] / made["b"][0] == pytest.approx(0.75, rel=2.0**-22)
    assert clipped(update, norm, norm) is update
    zero = {"a": np.zeros(3, np.float32)}
    assert clipped(zero, 0.0, 0.5) is zero
    still = folded([contribution("c0", ZEROS)], {"noise_multiplier": 0.0, "clip": 0.5})
    np.testing.assert_array_equal(still.tensors["a"], ZEROS["a"])


@pytest.mark.parametrize("count", [3, 5, 9])
def test_noise_has_the_stated_size_whoever_comes(count: int) -> None:
    """sigma / expected cohort, with 5 expected; 3 or 9 that come change nothing."""
    big = (TensorSpec("a", "float32", (400, 500), TensorRole.SHARED, TensorGroup.PARAM, "global"),)
    zeros = {"a": np.zeros((400, 500), np.float32)}
    options = {"dp": "central", "noise_multiplier": 0.8, "clip": 0.5, "expected_cohort": 5}
    given = [contribution(f"c{i}", zeros) for i in range(count)]
    noise = fold(create_strategy("fedavg", options), big, zeros, {}, given).mean.values["a"]
    wanted, n = 0.8 * 0.5 / 5, noise.size
    # the standard error of a standard deviation is sigma / sqrt(2 n), of a mean sigma / sqrt(n); five of them
    assert abs(noise.std() / wanted - 1.0) < 5.0 / math.sqrt(2 * n)
    assert abs(noise.mean()) < 5.0 * wanted / math.sqrt(n)
    again = fold(create_strategy("fedavg", options), big, zeros, {}, given).mean.values["a"]
    assert np.all(noise != again)  # seeded by the operating system, not by a constant


def test_a_missing_client_is_not_divided_away() -> None:
    ones = {n: np.ones(s, np.float32) for n, s in SHAPES.items()}
    given = [contribution(f"c{i}", ones) for i in range(2)]
    found = folded(given, {"noise_multiplier": 0.0, "clip": "inf", "expected_cohort": 4})
    np.testing.assert_array_equal(found.tensors["a"], np.full(SHAPES["a"], 0.5, np.float32))


def adapted(start: float, rounds: int, flip: bool = False) -> float:
    """The clip after rounds in which every norm is 10."""
    clip = start
    for _ in range(rounds):
        bits = [(clip >= 10.0) != flip] * 8
        clip = next_clip(clip, bits, 0.0, 8)
    return clip


@pytest.mark.parametrize("start", [0.1, 1000.0])
def test_the_adaptive_clip_comes_to_the_norms_from_both_sides(start: float) -> None:
    # a step is a factor exp(+-0.1), so it ends within one step of 10; 100 steps reach over exp(10), more than 100 times
    assert 10.0 * math.exp(-0.1) <= adapted(start, 100) <= 10.0 * math.exp(0.1)


def test_the_other_polarity_runs_away() -> None:
    """Planted error: a bit that says *clipped*, with the same sign, as a known framework has it."""
    assert adapted(0.1, 300, flip=True) == pytest.approx(0.1 * math.exp(-30.0), rel=1e-9)
    assert adapted(1000.0, 300, flip=True) > 1e15


@pytest.mark.parametrize("start", [0.01, 1e4])
def test_the_adaptive_clip_finds_the_median_through_folds_with_noise(start: float) -> None:
    norms = np.linspace(1.0, 9.0, 40)
    unit = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    unit["b"][0] = 1.0
    given = [
        contribution(f"c{i:02}", {n: (u * v).astype(np.float32) for n, u in unit.items()})
        for i, v in enumerate(norms)
    ]
    state: dict[str, np.ndarray] = {}
    options = {
        "adaptive_clip": "on",
        "clip": start,
        "noise_multiplier": 1.0,
        "expected_cohort": 40,
        "dp": "central",
    }
    strategy, clips = create_strategy("fedavg", options), []
    generator = np.random.default_rng(1)
    for _ in range(300):
        state = dict(fold(strategy, SPECS, ZEROS, state, given, generator=generator).state)
        clips.append(float(state["privacy/clip"]))
    assert int(state["privacy/rounds"]) == 300
    # near the median 5 the share b falls by 1/8 for each unit of the norm, so ln C returns by 0.2 * 5 / 8 = 1/8 a
    # round against noise of 0.2 * 2 / 40 = 0.01: deviation 0.01 / sqrt(2 / 8) = 0.02, five of them 10 %
    assert np.mean(np.abs(np.log(np.array(clips[-100:]) / 5.0))) < 0.1


def test_both_noised_releases_together_are_one_of_the_stated_multiplier() -> None:
    options = PrivacyOptions("central", 1.0, adaptive_clip="on", expected_cohort=40)
    assert options.bit_noise == 2.0
    # Gaussians compose as 1/z^2 = sum 1/z_i^2; the bits, counted from 1/2, have sensitivity 1/2
    assert options.sum_noise**-2 + (2.0 * options.bit_noise) ** -2 == pytest.approx(1.0, rel=1e-12)
    assert options.sum_noise == pytest.approx((1.0 - 1.0 / 16.0) ** -0.5, rel=1e-12)


def test_the_strategys_own_state_goes_on_beside_that_of_privacy() -> None:
    first = folded(updates(3), {**NOISELESS, "weighting": "uniform"}, strategy="fedadam")
    second = folded(updates(3, 1), NOISELESS, dict(first.state), strategy="fedadam")
    plain = create_strategy("fedadam", {"weighting": "uniform"})
    one = plain.server(SPECS, ZEROS, {}, updates(3))
    two = plain.server(SPECS, ZEROS, one.state, updates(3, 1))
    assert int(second.state["privacy/rounds"]) == 2
    for name, array in two.state.items():
        np.testing.assert_array_equal(second.state[name], array)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dp": "both"}, "off, central, local"),
        ({"dp": "central"}, "expected_cohort"),
        ({"dp": "central", "expected_cohort": 4, "clip": "inf"}, "finite clip"),
        ({"dp": "central", "expected_cohort": 4, "clip": -1}, "above 0"),
        ({"dp": "central", "expected_cohort": 4, "adaptive_clip": "on"}, "raise expected_cohort"),
        ({"dp": "central", "expected_cohort": 4, "noise_multiplier": "nan"}, "at least 0"),
    ],
)
def test_impossible_options_are_refused_with_what_to_do(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        create_strategy("fedavg", options)


def test_statistics_of_normalisation_are_refused_before_a_job_begins() -> None:
    part = splits(0)
    clients = (SimulatedClient("anna", part["train"], part["holdout"]),)
    made = create_strategy("fedavg", {"dp": "central", "expected_cohort": 1})
    with pytest.raises(ConfigError, match=r"fedbn.*cnn-plain"):
        simulate(
            made,
            model("cnn"),
            Population(clients),
            Simulation(1),
            lambda s: StackedClients(s, model("cnn"), 0),
        )


def test_statistics_that_get_to_the_mean_all_the_same_are_refused() -> None:
    specs = (*SPECS, TensorSpec("s", "float32", (2,), TensorRole.NORM_STAT, TensorGroup.BUFFER, "global"))
    mechanism = ClippedMean("uniform", options=PrivacyOptions("central", expected_cohort=1), clip=1.0)
    with pytest.raises(AggregationError, match="statistics"):
        mechanism.combine(specs, create_strategy("fedavg", {}).info.upload(), ZEROS, [])


def test_an_update_that_is_not_finite_is_refused() -> None:
    bad = {n: np.full(s, np.nan, np.float32) for n, s in SHAPES.items()}
    with pytest.raises(AggregationError, match="c0"):
        folded([contribution("c0", bad)], {"clip": 1.0})
