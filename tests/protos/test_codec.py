from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wearfleet_protos import codec
from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.v1 import telemetry_pb2 as pb

from protos import samples


def test_a_float32_window_survives_the_wire_unchanged() -> None:
    decoded = codec.decode_window(codec.encode(samples.WINDOW, "float32"))
    assert decoded.header == samples.HEADER
    assert decoded.sample_index == 448
    np.testing.assert_array_equal(decoded.samples, samples.WINDOW.samples)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 130), st.floats(1e-3, 1e4), st.floats(-1e4, 1e4), st.integers(0, 2**31)
)
def test_int16_loses_at_most_half_a_step_of_each_channels_range(
    channels: int, length: int, spread: float, centre: float, seed: int
) -> None:
    x = (np.random.default_rng(seed).normal(size=(channels, length)) * spread + centre).astype(np.float32)
    decoded = codec.decode_window(codec.encode(replace(samples.WINDOW, samples=x)))
    half_step = (x.max(axis=1) - x.min(axis=1)) / 65534 / 2
    rounding = (
        4 * np.finfo(np.float32).eps * np.abs(x).max(axis=1)
    )  # offset, scale, product and sum are float32
    assert (np.abs(decoded.samples - x).max(axis=1) <= half_step * 1.001 + rounding).all()


def test_a_constant_channel_is_exact_in_int16() -> None:
    x = np.full((2, 5), 9.80665, np.float32)
    decoded = codec.decode_window(codec.encode(replace(samples.WINDOW, samples=x)))
    np.testing.assert_array_equal(decoded.samples, x)


def test_predictions_health_and_status_survive_the_wire() -> None:
    prediction = codec.decode_prediction(codec.encode(samples.PREDICTION))
    assert (prediction.header, prediction.label, prediction.annotated_label) == (samples.HEADER, 1, 2)
    np.testing.assert_array_equal(prediction.probabilities, samples.PREDICTION.probabilities)
    assert (
        codec.decode_prediction(
            codec.encode(replace(samples.PREDICTION, annotated_label=None))
        ).annotated_label
        is None
    )
    assert (
        codec.decode_prediction(codec.encode(replace(samples.PREDICTION, annotated_label=0))).annotated_label
        == 0
    )
    assert codec.decode_health(codec.encode(samples.HEALTH)) == samples.HEALTH
    assert codec.decode_status(codec.encode(samples.STATUS)) == samples.STATUS


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_junk_is_refused_with_a_protocol_error(junk: bytes) -> None:
    for decode in (codec.decode_window, codec.decode_prediction, codec.decode_health, codec.decode_status):
        with pytest.raises(ProtocolError):
            decode(junk)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_still_gives_a_valid_message(position: int, bit: int) -> None:
    data = bytearray(codec.encode(samples.WINDOW, "float32"))
    data[position % len(data)] ^= 1 << bit
    try:
        window = codec.decode_window(bytes(data))
    except ProtocolError:
        return
    assert np.isfinite(window.samples).all()


def test_an_oversized_payload_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        codec.decode_window(b"\x00" * (codec.MAX_PAYLOAD_BYTES + 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_window_with_a_value_that_is_not_finite_is_refused(value: float) -> None:
    message = pb.SensorWindow.FromString(codec.encode(samples.WINDOW, "float32"))
    x = samples.WINDOW.samples.copy()
    x[0, 1] = value
    message.float32.data = x.tobytes()
    with pytest.raises(ProtocolError, match="NaN"):
        codec.decode_window(message.SerializeToString())


def test_a_window_whose_bytes_do_not_fit_its_shape_is_refused() -> None:
    message = pb.SensorWindow.FromString(codec.encode(samples.WINDOW, "float32"))
    message.samples = 5
    with pytest.raises(ProtocolError, match="need 40 bytes"):
        codec.decode_window(message.SerializeToString())


def test_another_schema_version_is_refused() -> None:
    message = pb.Health.FromString(codec.encode(samples.HEALTH))
    message.header.schema_version = 2
    with pytest.raises(ProtocolError, match="schema version"):
        codec.decode_health(message.SerializeToString())


def test_probabilities_that_do_not_sum_to_one_are_refused() -> None:
    message = pb.Prediction.FromString(codec.encode(samples.PREDICTION))
    message.probabilities[0] = 0.9
    with pytest.raises(ProtocolError, match="sum to 1"):
        codec.decode_prediction(message.SerializeToString())
