from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly
from wearfleet_protos.errors import DataError, ShapeError
from wearfleet_protos.recording import Channel, Recording, load_recordings, save_recordings
from wearfleet_protos.windowing import (
    StreamWindower,
    WindowSpec,
    convert_units,
    cut,
    cut_labelled,
    resample,
    split_by_time,
    window_starts,
)

CHANNELS = (Channel("acc_x", "m/s^2"), Channel("gyr_x", "rad/s"))


def _recording(labels: np.ndarray, session: str = "1") -> Recording:
    count = len(labels)
    samples = np.stack([np.arange(count), -np.arange(count)], axis=1).astype(np.float32)
    return Recording(samples, labels.astype(np.int16), 50.0, CHANNELS, "anna", "wrist", "watch", session)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 60), st.lists(st.integers(1, 50), min_size=1))
def test_a_stream_in_any_pieces_gives_the_windows_of_the_whole_signal(
    count: int, length: int, stride: int, pieces: list[int]
) -> None:
    signal = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
    spec = WindowSpec(length, stride, 50.0)
    windower, got, begin, turn = StreamWindower(spec, 2), [], 0, 0
    while begin < count:
        step = pieces[turn % len(pieces)]
        got += windower.push(signal[begin : begin + step])
        begin, turn = begin + step, turn + 1
    np.testing.assert_array_equal([start for start, _ in got], window_starts(count, spec))
    whole = cut(signal, spec)
    assert len(got) == len(whole)
    for (_, window), expected in zip(got, whole, strict=True):
        np.testing.assert_array_equal(window, expected)


def test_windows_of_a_hand_made_signal() -> None:
    signal = np.arange(7, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(cut(signal, WindowSpec(3, 2, 1.0))[:, 0], [[0, 1, 2], [2, 3, 4], [4, 5, 6]])
    assert cut(signal[:2], WindowSpec(3, 2, 1.0)).shape == (0, 1, 3)


def test_a_window_has_a_label_only_when_all_its_samples_have_it() -> None:
    windows = cut_labelled(_recording(np.array([0, 0, 0, 0, 1, 1, -1, -1, 2, 2])), WindowSpec(2, 1, 50.0))
    np.testing.assert_array_equal(windows.y, [0, 0, 0, -1, 1, -1, -1, -1, 2])
    np.testing.assert_array_equal(windows.labelled().start, [0, 1, 2, 4, 8])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-1, 3), min_size=20, max_size=200),
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0.1, 0.9),
)
def test_no_sample_is_in_both_parts_and_the_later_part_is_later(
    labels: list[int], length: int, stride: int, fraction: float
) -> None:
    runs = np.repeat(labels, 5)
    recordings = [_recording(runs[: len(runs) // 2], "1"), _recording(runs[len(runs) // 2 :], "2")]
    earlier, later = split_by_time(recordings, WindowSpec(length, stride, 50.0), fraction)
    used = {
        (int(r), s)
        for r, b in zip(earlier.recording, earlier.start, strict=True)
        for s in range(b, b + length)
    }
    held = {
        (int(r), s) for r, b in zip(later.recording, later.start, strict=True) for s in range(b, b + length)
    }
    assert not used & held
    for label in np.unique(earlier.y):
        before = [
            (int(r), int(s))
            for r, s in zip(
                earlier.recording[earlier.y == label], earlier.start[earlier.y == label], strict=True
            )
        ]
        after = [
            (int(r), int(s))
            for r, s in zip(later.recording[later.y == label], later.start[later.y == label], strict=True)
        ]
        assert not before or not after or max(before) < min(after)


def test_resampling_keeps_a_tone_below_the_new_nyquist_and_removes_one_above() -> None:
    t = np.arange(2000) / 100.0
    low = np.sin(2 * np.pi * 3.0 * t)[:, None].astype(np.float32)
    high = np.sin(2 * np.pi * 40.0 * t)[:, None].astype(np.float32)
    got = resample(low, 100.0, 50.0)
    expected = np.sin(2 * np.pi * 3.0 * np.arange(len(got)) / 50.0)
    np.testing.assert_allclose(got[40:-40, 0], expected[40:-40], atol=1e-5)  # float32 of a unit tone
    assert np.abs(resample(high, 100.0, 50.0)[40:-40]).max() < 1e-3  # Kaiser 8.6: stop band below -80 dB


def test_resampling_agrees_with_scipy_inside_the_pass_band() -> None:
    t = np.arange(3000) / 100.0
    signal = sum(np.sin(2 * np.pi * f * t + f) for f in (0.5, 1.7, 4.1))[:, None]
    ours = resample(signal.astype(np.float32), 100.0, 25.0)
    scipys = resample_poly(signal, 1, 4, axis=0, window=("kaiser", 8.6))
    np.testing.assert_allclose(ours[50:-50], scipys[50:-50], atol=6e-3)  # scipy's default filter is shorter


def test_resampling_by_one_returns_the_signal() -> None:
    signal = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.testing.assert_array_equal(resample(signal, 50.0, 50.0), signal)
    assert resample(signal, 50.0, 20.0).shape == (20, 3)
    with pytest.raises(ShapeError, match="small fraction"):
        resample(signal, 50.0, 49.9871)


def test_units_are_converted_by_name_and_refused_when_unknown() -> None:
    have = (Channel("acc_x", "g"), Channel("gyr_x", "deg/s"))
    got = convert_units(np.array([[1.0, 180.0]], np.float32), have, CHANNELS)
    np.testing.assert_allclose(got, [[9.80665, np.pi]], rtol=1e-6)
    with pytest.raises(ShapeError, match="no conversion"):
        convert_units(np.ones((1, 2), np.float32), (Channel("acc_x", "V"), have[1]), CHANNELS)
    with pytest.raises(ShapeError, match="expected channels"):
        convert_units(np.ones((1, 2), np.float32), have[::-1], CHANNELS)


def test_the_stream_refuses_nan_and_the_wrong_number_of_channels() -> None:
    windower = StreamWindower(WindowSpec(4, 2, 50.0), 2)
    with pytest.raises(ShapeError, match="NaN"):
        windower.push(np.array([[1.0, np.nan]], np.float32))
    with pytest.raises(ShapeError, match="expected samples"):
        windower.push(np.ones((3, 1), np.float32))


def test_recordings_survive_the_file_and_damage_is_a_data_error(tmp_path) -> None:
    path = tmp_path / "anna.npz"
    save_recordings(path, [_recording(np.arange(9)), _recording(np.zeros(4), "2")], ["a", "b"])
    recordings, names = load_recordings(path)
    assert names == ("a", "b")
    assert [r.session for r in recordings] == ["1", "2"]
    np.testing.assert_array_equal(recordings[0].samples[:, 1], -np.arange(9))
    assert recordings[0].channels == CHANNELS
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="write it again"):
        load_recordings(path)
    with pytest.raises(DataError, match="no such"):
        load_recordings(tmp_path / "none.npz")
