"""The simulated shift is what it says: the signal tells the class everywhere, the spurious channel does not."""

from __future__ import annotations

import numpy as np
import pytest
from shifted_sinusoids import (
    AGREEMENT,
    CHANNELS,
    FREQUENCIES_HZ,
    RATE_HZ,
    SPURIOUS,
    ShiftedDomain,
    shifted_sinusoids,
)

DOMAINS = shifted_sinusoids(length=128)


def test_three_sources_and_a_target_of_equal_classes() -> None:
    assert [d.name for d in DOMAINS] == ["source 0", "source 1", "source 2", "target"]
    for domain in DOMAINS:
        assert domain.x.shape == (180, CHANNELS, 128)
        assert domain.x.dtype == np.float32
        assert np.bincount(domain.y).tolist() == [60, 60, 60]
        assert np.isfinite(domain.x).all()


def test_the_spurious_channel_tells_just_the_shares() -> None:
    for domain, share in zip(DOMAINS, AGREEMENT, strict=True):
        assert (domain.told == domain.y).mean() == pytest.approx(share)
        level = domain.x[:, SPURIOUS].mean(axis=1)  # levels are 1 apart, noise of 1 averages to 0.09
        assert (np.rint(level + 1).astype(int) == domain.told).all()


def spectrum_class(domain: ShiftedDomain) -> np.ndarray:
    """The class whose frequency carries most power over the inertial channels: it looks at nothing of a domain."""
    signal = domain.x[:, :SPURIOUS] - domain.x[:, :SPURIOUS].mean(axis=2, keepdims=True)
    time = np.arange(domain.x.shape[2]) / RATE_HZ
    waves = np.exp(-2j * np.pi * np.outer(FREQUENCIES_HZ, time))
    power = (np.abs(np.einsum("nct,kt->nck", signal, waves)) ** 2).sum(axis=1)
    return power.argmax(axis=1)


def test_the_signal_tells_the_class_in_every_domain() -> None:
    for domain in DOMAINS:
        assert (spectrum_class(domain) == domain.y).mean() > 0.98


def test_who_reads_the_signal_through_much_noise_still_beats_who_trusts_the_channel() -> None:
    target = shifted_sinusoids(noise=2.0)[-1]
    assert (target.told == target.y).mean() == pytest.approx(0.1)
    assert (spectrum_class(target) == target.y).mean() > 0.9


def test_domains_differ_in_turn_gain_and_offset_and_turns_are_proper() -> None:
    for domain in DOMAINS:
        for turn in domain.rotations:
            np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
            assert np.linalg.det(turn) == pytest.approx(1.0)
        # the mean of 180 x 128 samples of noise 1 strays by 0.007; windows hold whole periods but for jitter
        mean = domain.x[:, :SPURIOUS].mean(axis=(0, 2))
        np.testing.assert_allclose(mean, domain.offset, atol=0.05)
    for one, other in ((0, 1), (0, 3), (2, 3)):
        assert np.abs(DOMAINS[one].offset - DOMAINS[other].offset).max() > 0.2
        assert np.abs(np.log(DOMAINS[one].gain / DOMAINS[other].gain)).max() > 0.2
        assert np.abs(DOMAINS[one].rotations - DOMAINS[other].rotations).max() > 0.2


def test_undoing_a_domain_leaves_the_common_axes() -> None:
    """Without gain, offset and turn every triad moves along the same line."""
    for domain in shifted_sinusoids(noise=0.0):
        signal = (domain.x[:, :SPURIOUS] - domain.offset[:, None]) / domain.gain[:, None]
        for number, turn in enumerate(domain.rotations):
            triad = turn.T @ signal[:, 3 * number : 3 * number + 3]  # (N, 3, T)
            np.testing.assert_allclose(triad[:, 1], 0.6 * triad[:, 0], atol=1e-5)  # float32
            np.testing.assert_allclose(triad[:, 2], 0.3 * triad[:, 0], atol=1e-5)


def test_the_seed_decides_everything() -> None:
    for one, same, other in zip(
        DOMAINS, shifted_sinusoids(length=128), shifted_sinusoids(length=128, seed=1), strict=True
    ):
        np.testing.assert_array_equal(one.x, same.x)
        assert not np.array_equal(one.x, other.x)
