"""Clip and noise of a device, the analytic Gaussian, and what a plan may say of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from protos.samples import PLAN
from wearfleet_protos.errors import ConfigError, ProtocolError
from wearfleet_protos.plan import Plan
from wearfleet_protos.privacy import gaussian_epsilon, joint_norm, protected, secret_generator
from wearfleet_protos.tensors import TensorGroup, TensorRole


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3, 1.0, 5.0, 30.0, 1e4])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_the_analytic_gaussian_is_the_librarys(noise: float, delta: float) -> None:
    # both solve one equation in float64; where epsilon is small, delta is a difference of numbers near 1/2, so its
    # relative rounding is 2^-53 / delta, about 1e-7 at 1e-9, and epsilon's is no larger
    assert gaussian_epsilon(noise, delta) == pytest.approx(get_epsilon_gaussian(noise, delta), rel=1e-6)


def test_the_classical_bound_is_too_small_above_epsilon_one() -> None:
    """sqrt(2 ln(1.25 / delta)) / epsilon claims more than it gives: why it is not used."""
    for claimed in (10.0, 20.0):
        noise = math.sqrt(2.0 * math.log(1.25 / 1e-5)) / claimed
        assert gaussian_epsilon(noise, 1e-5) > claimed


def test_nothing_is_claimed_without_noise_and_nonsense_is_refused() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == math.inf
    for noise, delta in ((-1.0, 0.1), (1.0, 0.0), (1.0, 1.0), (math.nan, 0.1)):
        with pytest.raises(ConfigError):
            gaussian_epsilon(noise, delta)


def test_a_device_clips_and_adds_noise_of_the_stated_size_that_nobody_can_repeat() -> None:
    update = {"a": np.full((400, 500), 3.0, np.float32), "b": np.zeros(7, np.float32)}
    one, two = (protected(update, 2.0, 0.5, secret_generator()) for _ in range(2))
    assert {n: (a.shape, a.dtype) for n, a in one.items()} == {
        n: (a.shape, a.dtype) for n, a in update.items()
    }
    assert (
        np.mean(one["a"] == two["a"]) < 1e-3
    )  # equal only where two float32 draws near 2^-2 coincide, about 1e-7
    short = 2.0 / math.sqrt(200_000)  # each coordinate of "a" after clipping
    n = one["a"].size
    # standard errors: of a deviation sigma / sqrt(2 n), of a mean sigma / sqrt(n); five of them
    assert abs(one["a"].std() / 0.5 - 1.0) < 5.0 / math.sqrt(2 * n)
    assert abs(one["a"].mean() - short) < 5.0 * 0.5 / math.sqrt(n)
    bare = protected(update, 2.0, 0.0, secret_generator())
    assert 2.0 * (1.0 - 2.0**-21) <= joint_norm(bare) <= 2.0


def test_a_plan_says_clip_and_noise_and_an_older_one_none() -> None:
    noisy = replace(PLAN, upload=replace(PLAN.upload, clip=1.5, noise=0.25))
    assert Plan.from_bytes(noisy.to_bytes()) == noisy
    assert b'"clip":1.5' in noisy.to_bytes()
    assert b"clip" not in PLAN.to_bytes()
    assert (PLAN.upload.clip, PLAN.upload.noise) == (0.0, 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": -1.0},
        {"clip": math.inf},
        {"clip": math.nan},
        {"noise": 1.0},
        {"clip": 1.0, "noise": -1.0},
        {"clip": 1.0, "form": "value"},
        {"clip": 1.0, "roles": (TensorRole.SHARED, TensorRole.NORM_STAT)},
    ],
)
def test_what_cannot_be_protected_is_refused(changes: dict[str, object]) -> None:
    upload = replace(PLAN.upload, groups=(TensorGroup.PARAM, TensorGroup.BUFFER), **changes)
    tensors = tuple(replace(t, origin="global") if t.origin == "local" else t for t in PLAN.tensors)
    with pytest.raises(ProtocolError, match="clip"):
        replace(PLAN, upload=upload, tensors=tensors, keep_local=())
