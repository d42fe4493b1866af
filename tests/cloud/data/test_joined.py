"""Joined data sets: units, axes, rate and labels in common, or as published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import official_layouts
import pytest
from wearfleet_cloud.data import DATASETS
from wearfleet_cloud.data.dataset import INERTIAL6, Counts, Dataset, Progress, silent
from wearfleet_cloud.data.joined import STRICT_CHANNELS, JoinedReader, Member
from wearfleet_cloud.data.prepared import prepare
from wearfleet_cloud.data.scenarios import build_scenario, possible_scenarios
from wearfleet_protos.errors import ConfigError, DataError
from wearfleet_protos.recording import Channel, Recording
from wearfleet_protos.windowing import WindowSpec, convert_units, cut

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


def published(signal: np.ndarray, offset: int) -> np.ndarray:
    """Windows by the benchmark's loader as specs/ood.md 1.3 tells it: stored windows first, then fewer samples, then 50
    at a time. 100 Hz to 25 Hz is blocks of 4 of which one is kept."""
    stored = [signal[start : start + 200] for start in range(0, len(signal) - 199, 100)]
    kept = [window.reshape(50, 4, -1)[:, offset] for window in stored]
    return np.stack([w[start : start + 50].T for w in kept for start in range(0, len(w) - 49, 25)])


def test_the_strict_form_cuts_the_windows_of_the_published_loader() -> None:
    """For 100 Hz: stored windows of 200 every 100 samples become windows of 50 every 25, which are ours."""
    recording = joined(strict=True)
    source = next(iter(Tone().read(None, silent)))
    measured = tuple(Channel(c.name, {"m/s^2": "g", "rad/s": "deg/s"}[c.unit]) for c in INERTIAL6)
    signal = convert_units(np.ascontiguousarray(source.samples[:, 1:]), INERTIAL6, measured)
    ours = cut(recording.samples, WindowSpec(50, 25, 25.0))
    matching = [offset for offset in range(4) if np.array_equal(published(signal, offset), ours)]
    assert len(matching) == 1  # the offset that was drawn; the tone on y tells the four apart


def test_both_forms_are_the_same_every_time() -> None:
    for strict in (False, True):
        np.testing.assert_array_equal(joined(strict=strict).samples, joined(strict=strict).samples)


@dataclass(frozen=True)
class Elsewhere(Tone):
    """Is there only when its folder is; once there it can be damaged."""

    def fingerprint(self, root: Path | None) -> str:
        if root is None or not (root / "elsewhere").is_dir():
            raise DataError("no elsewhere")
        return "elsewhere"

    def read(self, root: Path | None, progress: Progress) -> Iterator[Recording]:
        if (root / "elsewhere" / "damaged").exists():  # type: ignore[operator]
            raise DataError("damaged")
        yield from super().read(root, progress)


def test_a_member_that_is_missing_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [replace(MEMBER, dataset=replace(TONE, name=name)) for name in ("one", "two")]
    far = replace(MEMBER, dataset=replace(TONE, name="far", reader=Elsewhere()))
    reader = JoinedReader((members[0], far, members[1]), ("climb", "rest"), 25.0)
    assert [r.subject for r in reader.read(tmp_path, silent)] == ["one/7", "two/7"]
    assert f"joined without far: not in {tmp_path}" in caplog.text
    assert reader.counts(tmp_path, silent)["recordings_by_member"] == {"one": 1, "far": 0, "two": 1}
    without = reader.fingerprint(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert reader.fingerprint(tmp_path) != without
    assert [r.subject for r in reader.read(tmp_path, silent)] == ["one/7", "far/7", "two/7"]


def test_a_member_that_is_damaged_is_an_error_and_one_alone_is_too_few(tmp_path: Path) -> None:
    far = replace(MEMBER, dataset=replace(TONE, name="far", reader=Elsewhere()))
    reader = JoinedReader((MEMBER, far), ("climb", "rest"), 25.0)
    with pytest.raises(DataError, match="of tone, far at least two must be in the data root; no elsewhere"):
        reader.fingerprint(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "damaged").touch()
    with pytest.raises(DataError, match="damaged"):
        list(reader.read(tmp_path, silent))


LYING, STANDING = 1, 3  # of PAMAP2


def test_pamap2_joins_by_its_chest_unit_with_up_forward_left(tmp_path: Path) -> None:
    """Standing, the chest's y reads gravity; a turn about y is a turn about the vertical."""
    rows = official_layouts.pamap2_rows(np.repeat([STANDING, LYING], 400))
    rows[:, 3:] = 0.0
    rows[:400, 20 + 2], rows[400:, 20 + 3], rows[:, 20 + 8] = (
        G,
        -G,
        2.0,
    )  # acceleration y, z; angular velocity y
    official_layouts.write_pamap2(tmp_path, {101: rows})
    upright = np.tile([1.0, 0, 0, 90.0, 0, 0], (400, 1))
    official_layouts.write_usc_had(tmp_path, {1: {8: upright, 9: upright, 12: upright}})
    prepared = prepare(DATASETS["har-common"], tmp_path, tmp_path / "cache")
    assert "cross-dataset" in possible_scenarios(prepared)
    scenario = build_scenario("cross-dataset", prepared, ("pamap2",))
    assert [d.name for d in scenario.sources] == ["usc-had"]
    labels = DATASETS["har-common"].label_names
    # away from the ends and the change, which the filter's 64 samples a side blur
    standing = scenario.target.x[scenario.target.y == labels.index("standing")][0, :, 20:30]
    lying = scenario.target.x[scenario.target.y == labels.index("lying")][-1, :, 20:30]
    np.testing.assert_allclose(standing.T, np.tile([G, 0, 0, 2.0, 0, 0], (10, 1)), atol=1e-4)
    np.testing.assert_allclose(lying.T, np.tile([0, G, 0, 2.0, 0, 0], (10, 1)), atol=1e-4)
    sitting = scenario.sources[0].x[scenario.sources[0].y == labels.index("sitting")][0, :, 25]
    np.testing.assert_allclose(sitting, [G, 0, 0, np.pi / 2, 0, 0], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(ConfigError, match="no classes \\['swim'\\]"):
        replace(MEMBER, classes={"swim": "rest"})
    with pytest.raises(ConfigError, match="not a rotation by right angles"):
        replace(MEMBER, axes=((-1, 0, 0), (0, 1, 0), (0, 0, 1)))  # a mirror image
    with pytest.raises(ConfigError, match="lacks some of the channels"):
        replace(MEMBER, dataset=replace(TONE, channels=CHANNELS[:4]))
    with pytest.raises(ConfigError, match="no multiple of 30"):
        JoinedReader((MEMBER,), ("climb", "rest"), 30.0)
