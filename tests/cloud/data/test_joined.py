"""Joined data sets: units, axes, rate and labels in common, or as published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from wearfleet_cloud.data.dataset import INERTIAL6, Counts, Dataset, Progress, silent
from wearfleet_cloud.data.joined import STRICT_CHANNELS, JoinedReader, Member
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.recording import Channel, Recording

G = 9.80665


@dataclass(frozen=True)
class Tone:
    """One recording: 100 Hz, gravity on z, a slow tone on x that passes 25 Hz and a fast one on y that does not."""

    def fingerprint(self, root: Path | None) -> str:
        return "tone"

    def counts(self, root: Path | None, progress: Progress) -> Counts:
        return {}

    def read(self, root: Path | None, progress: Progress) -> Iterator[Recording]:
        time = np.arange(1000) / 100.0
        samples = np.zeros((1000, 7), np.float32)
        samples[:, 1] = np.sin(2 * np.pi * 2.0 * time)
        samples[:, 2] = np.sin(2 * np.pi * 24.0 * time)
        samples[:, 3] = G
        samples[:, 4:] = [np.pi, 0.0, np.pi / 2]
        labels = np.repeat([0, 1, 2, 3, -1], 200).astype(np.int16)
        for position in ("hip", "wrist"):
            yield Recording(samples, labels, 100.0, CHANNELS, "7", position, "unit", "day")


CHANNELS = (Channel("extra", "V"), *INERTIAL6)
TONE = Dataset(
    "tone", "", "", "", CHANNELS, ("sit", "up", "run"), 100.0, 200, 100, Tone(), other_labels=("fall",)
)
MEMBER = Member(
    TONE,
    {"sit": "rest", "up": "climb"},
    ("hip",),
    axes=((0, 0, 1), (1, 0, 0), (0, 1, 0)),
    units=("g", "deg/s"),
)


def joined(member: Member = MEMBER, *, strict: bool = False) -> Recording:
    (recording,) = JoinedReader((member,), ("climb", "rest"), 25.0, strict).read(None, silent)
    return recording


def test_labels_and_origin_are_those_of_the_joined_set() -> None:
    for recording in (joined(), joined(strict=True)):
        assert recording.labels.tolist() == [1] * 50 + [0] * 50 + [-1] * 150
        assert (recording.subject, recording.position, recording.rate_hz) == ("tone/7", "hip", 25.0)


def test_axes_are_turned_and_the_tone_that_does_not_fit_the_rate_is_filtered_out() -> None:
    recording = joined()
    assert recording.channels == INERTIAL6
    middle = recording.samples[50:200]
    time = np.arange(50, 200) / 25.0
    np.testing.assert_allclose(middle[:, 0], G, rtol=1e-5)  # up was z
    # the filter's pass band is flat to its Kaiser ripple (beta 8.6: 90 dB)
    np.testing.assert_allclose(middle[:, 1], np.sin(2 * np.pi * 2.0 * time), atol=1e-3)
    assert np.abs(middle[:, 2]).max() < 1e-3  # 24 Hz would appear as 1 Hz
    np.testing.assert_allclose(middle[0, 3:], [np.pi / 2, np.pi, 0.0], rtol=1e-5)


def test_the_strict_form_keeps_units_axes_and_aliases() -> None:
    recording = joined(strict=True)
    assert recording.channels == STRICT_CHANNELS
    np.testing.assert_allclose(recording.samples[0, 2:], [1.0, 180.0, 0.0, 90.0], rtol=1e-5)
    assert np.abs(recording.samples[:, 1]).max() > 0.09  # the 24 Hz tone, in g, aliased
    source = next(iter(Tone().read(None, silent))).samples
    offsets = [o for o in range(4) if np.allclose(recording.samples[:, 0] * G, source[o::4, 1], atol=1e-5)]
    assert len(offsets) == 1
    np.testing.assert_array_equal(recording.samples, joined(strict=True).samples)


def test_recordings_of_other_positions_or_without_a_common_class_are_left_out() -> None:
    everywhere = JoinedReader((replace(MEMBER, positions=()),), ("climb", "rest"), 25.0)
    assert [r.position for r in everywhere.read(None, silent)] == ["hip", "wrist"]
    nothing = JoinedReader((replace(MEMBER, classes={}),), ("climb", "rest"), 25.0)
    assert list(nothing.read(None, silent)) == []


def test_the_fingerprint_follows_how_the_sets_are_joined() -> None:
    reader = JoinedReader((MEMBER,), ("climb", "rest"), 25.0)
    others = [
        replace(reader, strict=True),
        replace(reader, rate_hz=50.0),
        replace(reader, members=(replace(MEMBER, positions=()),)),
        replace(reader, members=(replace(MEMBER, classes={"sit": "rest"}),)),
    ]
    prints = {r.fingerprint(None) for r in (reader, *others)}
    assert len(prints) == 1 + len(others)
    assert reader.fingerprint(None) == replace(reader).fingerprint(None)


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(ConfigError, match="no classes \\['swim'\\]"):
        replace(MEMBER, classes={"swim": "rest"})
    with pytest.raises(ConfigError, match="not a rotation by right angles"):
        replace(MEMBER, axes=((-1, 0, 0), (0, 1, 0), (0, 0, 1)))  # a mirror image
    with pytest.raises(ConfigError, match="lacks some of the channels"):
        replace(MEMBER, dataset=replace(TONE, channels=CHANNELS[:4]))
    with pytest.raises(ConfigError, match="no multiple of 30"):
        JoinedReader((MEMBER,), ("climb", "rest"), 30.0)
