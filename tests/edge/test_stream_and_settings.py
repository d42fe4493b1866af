"""From samples to messages, and from settings to what the agent does; no network."""

import os
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from edge.tiny_graphs import CHANNELS, CONTRACT, LABELS, make_recording, make_release
from wearfleet_edge.config import AgentConfig, SensorConfig, load_config, parse_config, with_changes
from wearfleet_edge.memory import _code_mappings, release_memory, resident_bytes
from wearfleet_edge.models import ActiveModel
from wearfleet_edge.outbox import Outbox
from wearfleet_edge.pipeline import HeaderFactory, Pipeline
from wearfleet_edge.policy import SharingPolicy
from wearfleet_edge.runtime import Recogniser
from wearfleet_edge.sensors.replay import Chunk, ReplaySensor, conform, load_replay, paced
from wearfleet_edge.slots import InstalledModel
from wearfleet_edge.state import atomic_write, read_json, write_json
from wearfleet_edge.streaming import Streamer
from wearfleet_edge.transport.backoff import Backoff, with_retries
from wearfleet_edge.wearer import Wearer
from wearfleet_protos.codec import decode_prediction, decode_window
from wearfleet_protos.errors import ConfigError, DataError, ShapeError, TransportError
from wearfleet_protos.messages import ClockQuality
from wearfleet_protos.recording import Channel, save_recordings
from wearfleet_protos.windowing import WindowSpec, cut_labelled

SPEC = WindowSpec(8, 4, 20.0)
OPEN = SharingPolicy(raw_windows=True, annotations=True)


@pytest.fixture(scope="module")
def recogniser():
    return Recogniser(*make_release())


def _headers():
    return HeaderFactory(
        "anna-1f3a", "0123abcd", ClockQuality.REPLAY, time.time_ns, lambda: os.urandom(16).hex()
    )


def _chunks(recording, size):
    for begin in range(0, len(recording.samples), size):
        part = slice(begin, begin + size)
        yield Chunk(recording.samples[part], recording.labels[part], begin == 0)


@pytest.mark.parametrize("size", [1, 3, 8, 50, 10_000])
def test_every_chunking_gives_the_windows_and_labels_of_the_whole_recording(recogniser, size):
    recording = make_recording()
    pipeline = Pipeline(lambda: recogniser, _headers(), OPEN)
    found = [window for chunk in _chunks(recording, size) for window, _ in pipeline.push(chunk)]
    wanted = cut_labelled(recording, SPEC)
    assert [w.sample_index for w in found] == wanted.start.tolist()
    np.testing.assert_array_equal([w.samples for w in found], wanted.x)
    assert [-1 if w.label is None else w.label for w in found] == wanted.y.tolist()


def test_no_window_reaches_across_two_recordings_and_the_index_goes_on(recogniser):
    first, second = make_recording(), make_recording(seed=1)
    pipeline = Pipeline(lambda: recogniser, _headers(), OPEN)
    found = [w for r in (first, second) for chunk in _chunks(r, 7) for w, _ in pipeline.push(chunk)]
    starts = cut_labelled(first, SPEC).start
    assert [w.sample_index for w in found] == [*starts, *(starts + len(first.samples))]


def test_nan_samples_are_refused_and_the_stream_goes_on_after_them(recogniser):
    recording = make_recording()
    broken = recording.samples.copy()
    broken[100, 1] = np.nan
    chunks = list(_chunks(replace(recording, samples=broken), 10))
    pipeline = Pipeline(lambda: recogniser, _headers(), OPEN)
    found = []
    for chunk in chunks:
        if np.isfinite(chunk.samples).all():
            found += [w for w, _ in pipeline.push(chunk)]
        else:
            with pytest.raises(ShapeError, match="NaN"):
                pipeline.push(chunk)
    assert not any(100 - 8 < w.sample_index <= 109 for w in found)
    for window in found:
        wanted = recording.samples[window.sample_index : window.sample_index + 8].T
        np.testing.assert_array_equal(window.samples, wanted)


def test_messages_say_what_was_recognised_and_policy_decides_what_is_said(recogniser):
    chunk = next(_chunks(make_recording(), 8))
    ((window, messages),) = Pipeline(lambda: recogniser, _headers(), OPEN).push(chunk)
    kinds = dict(messages)
    prediction, raw = decode_prediction(kinds["tele/prediction"](5)), decode_window(kinds["tele/window"](6))
    assert prediction.header.sequence == 5
    assert prediction.header.trace_id == raw.header.trace_id
    assert prediction.label == window.recognition.label
    assert prediction.model_digest == recogniser.manifest.digest
    assert prediction.annotated_label == 0
    np.testing.assert_allclose(raw.samples, window.samples, atol=1e-3)
    closed = SharingPolicy(raw_windows=False, annotations=False)
    ((_, messages),) = Pipeline(lambda: recogniser, _headers(), closed).push(chunk)
    assert [kind for kind, _ in messages] == ["tele/prediction"]
    assert decode_prediction(messages[0][1](0)).annotated_label is None


def test_conform_brings_order_units_rate_and_classes_to_the_models():
    recording = make_recording(rate_hz=40.0)
    other = replace(
        recording,
        samples=np.ascontiguousarray(recording.samples[:, ::-1]) / np.float32(9.80665),
        channels=tuple(Channel(c.name, "g") for c in reversed(CHANNELS)),
    )
    (found,) = conform((other,), ("walking", "sitting"), CONTRACT)
    assert found.channels == CHANNELS
    assert found.rate_hz == 20.0
    assert len(found.samples) == len(recording.samples) // 2
    assert abs(found.samples[20:150].mean(axis=0) - (1.0, 0.0, 2.0)).max() < 0.2
    assert found.labels[0] == 1  # index 0 of the file is walking, which the model calls 1
    assert found.labels[-1] == 0


def test_a_class_the_model_does_not_know_becomes_unlabelled():
    (found,) = conform((make_recording(),), ("swimming", "walking"), CONTRACT)
    assert set(found.labels.tolist()) == {-1, 1}


def test_a_missing_channel_is_said():
    recording = make_recording()
    two = replace(recording, samples=recording.samples[:, :2], channels=CHANNELS[:2])
    with pytest.raises(DataError, match="acc_z"):
        conform((two,), LABELS, CONTRACT)


def test_a_file_without_samples_is_refused(tmp_path):
    save_recordings(tmp_path / "r.npz", [], LABELS)
    with pytest.raises(DataError, match="no samples"):
        load_replay(tmp_path / "r.npz")


@pytest.mark.parametrize("repeat", [False, True])
def test_skipping_begins_in_the_middle_and_repeats_from_the_start(repeat):
    sensor = ReplaySensor((make_recording(seconds=2.0), make_recording(seconds=2.0, seed=1)), repeat=repeat)
    taken = []
    for chunk in sensor.chunks(skip=50):
        taken.append(chunk)
        if len(taken) > 60:
            break
    whole = np.concatenate((make_recording(seconds=2.0).samples, make_recording(seconds=2.0, seed=1).samples))
    joined = np.concatenate([c.samples for c in taken])
    np.testing.assert_array_equal(joined[:30], whole[50:])
    assert len(joined) > 30 if repeat else len(joined) == 30


@pytest.mark.parametrize(("speed", "seconds"), [(1.0, 20.0), (10.0, 2.0), (0.0, 0.0)])
def test_pace_is_that_of_the_recording_times_speed(speed, seconds):
    now = [0.0]

    def wait(delay):
        now[0] += delay
        return False

    sensor = ReplaySensor((make_recording(),), repeat=False)
    list(paced(sensor.chunks(), 20.0, speed, monotonic=lambda: now[0], wait=wait))
    assert now[0] == pytest.approx(seconds)


def test_a_stop_ends_the_replay():
    sensor = ReplaySensor((make_recording(),), repeat=True)
    assert list(paced(sensor.chunks(), 20.0, 1.0, monotonic=lambda: 0.0, wait=lambda _: True)) == []


def test_a_model_for_other_windows_takes_over_without_a_restart(tmp_path):
    data, manifest = make_release()
    active = ActiveModel()
    active.use(InstalledModel("sha256:" + "0" * 64, manifest, data), None)
    outbox = Outbox(
        tmp_path / "o", boot="00000001", clock_ns=time.time_ns, max_messages=9999, max_bytes=1 << 30
    )
    calls = [0]

    def wait(_delay):
        calls[0] += 1
        if calls[0] == 100:
            other = make_release(2, metadata={"wearfleet.stride": "8"})
            wide = replace(other[1], contract=replace(other[1].contract, stride=8))
            active.use(InstalledModel("sha256:" + "1" * 64, wide, other[0]), None)
        return False

    streamer = Streamer(
        wearer=Wearer((make_recording(),), LABELS, 0.5),
        active=active,
        outbox=outbox,
        headers=_headers(),
        policy=SharingPolicy(raw_windows=False, annotations=True),
        sensor=SensorConfig(speed=0.0),
        wait=wait,
    )
    streamer.run()
    rows = [decode_prediction(row.payload) for row in outbox.lease(10_000)]
    steps = [b.sample_index - a.sample_index for a, b in pairwise(rows)]
    assert {p.model_version for p in rows} == {1, 2}
    assert steps[0] == 4
    assert steps[-1] == 8
    assert streamer.statistics.finished
    assert streamer.statistics.windows == len(rows)
    assert streamer.statistics.confusion.sum() == sum(p.annotated_label is not None for p in rows)


def test_settings_from_a_file_replace_the_defaults(tmp_path):
    path = tmp_path / "agent.toml"
    path.write_text(
        'health_seconds = 2\n[sensor]\nrecording = "a.npz"\nspeed = 4\n[policy]\nshare_raw_windows = true\n'
    )
    config = load_config(path)
    assert config.sensor == SensorConfig("a.npz", 4.0)
    assert config.policy.share_raw_windows
    assert config.health_seconds == 2.0
    assert load_config(tmp_path / "none.toml") == AgentConfig()
    assert not AgentConfig().policy.share_raw_windows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sensr = 1", "unknown key sensr"),
        ("[sensor]\nspeeed = 1", r"unknown key sensor\.speeed"),
        ("[sensor]\nspeed = 'fast'", r"sensor\.speed must be float"),
        ("[sensor]\nspeed = -1", "0 or more"),
        ("sensor = 3", "sensor must be a section"),
        ("[sensor]\nrepeat = 1", "repeat must be bool"),
        ("[outbox]\nmax_messages = 0", "at least 1"),
        ("[federation]\nholdout_fraction = 1.0", "between 0 and 1"),
        ("[federation]\nmax_lora_rank = 0", r"federation\.max_lora_rank must be at least 1"),
        ("[federation]\nmax_lora_rank = 2.0", r"federation\.max_lora_rank must be int"),
        ("[broker]\nport = 70000", "1 to 65535"),
        ("not toml", "not TOML"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(text)


def test_flags_change_only_what_they_give():
    config = with_changes(parse_config("[sensor]\nspeed = 4"), "sensor", recording="b.npz", speed=None)
    assert config.sensor == SensorConfig("b.npz", 4.0)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_json(path, {"old": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, b"new")
    assert read_json(path) == {"old": 1}
    monkeypatch.undo()
    atomic_write(path, b"{}", mode=0o600)  # the leftover of the failed write is no obstacle
    assert path.stat().st_mode & 0o777 == 0o600


def test_delays_grow_to_their_cap_and_carry_jitter():
    full = Backoff(0.5, 60.0, lambda: 1.0)
    assert [full.delay(n) for n in (1, 2, 3, 20)] == [0.5, 1.0, 2.0, 60.0]
    assert Backoff(0.5, 60.0, lambda: 0.25).delay(2) == 0.25


def test_retries_stop_at_success_at_the_limit_and_at_errors_for_good():
    waits = []

    def attempt(errors):
        error = errors.pop(0)
        if error is not None:
            raise error
        return "done"

    def retry(errors):
        waits.clear()
        backoff = Backoff(1.0, 8.0, lambda: 1.0)
        return with_retries(
            lambda: attempt(errors), attempts=3, backoff=backoff, wait=lambda s: bool(waits.append(s))
        )

    weak, final = TransportError("again"), TransportError("never", retryable=False)
    assert retry([weak, weak, None]) == "done"
    assert waits == [1.0, 2.0]
    with pytest.raises(TransportError, match="again"):
        retry([weak, weak, weak, None])
    with pytest.raises(TransportError, match="never"):
        retry([final, None])
    assert waits == []


def test_released_memory_leaves_everything_working(recogniser):
    window = make_recording().samples[:8].T.copy()
    before = recogniser.recognise(window)
    release_memory()
    after = recogniser.recognise(window)
    np.testing.assert_array_equal(before.probabilities, after.probabilities)
    assert resident_bytes() > 1_000_000


def test_only_code_that_was_never_written_is_released():
    maps = (
        "1000-3000 r-xp 00000000 08:01 1 /usr/lib/a.so\n"
        "3000-4000 r--p 00000000 08:01 1 /usr/lib/a.so\n"
        "4000-5000 rwxp 00000000 08:01 1 /usr/lib/jit.so\n"
        "5000-6000 r-xp 00000000 00:00 0 [vdso]\n"
        "6000-7000 rw-p 00000000 00:00 0\n"
    )
    assert _code_mappings(maps) == [(0x1000, 0x3000)]
