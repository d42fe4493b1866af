from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from wearfleet_protos.batching import batches, rng_key, shuffle_order
from wearfleet_protos.errors import IntegrityError, ProtocolError, ShapeError
from wearfleet_protos.plan import Loop
from wearfleet_protos.tensors import (
    check_finite,
    decode_tensors,
    digest_of,
    encode_tensors,
    parse_digest,
    schema_hash,
    tensor_metadata,
)
from wearfleet_protos.topics import NAME_PATTERN, Command, Topic, TopicKind, parse_topic, subscription

from protos import samples

ARRAYS = {"b": np.array(3, np.int64), "a": np.arange(6, dtype=np.float32).reshape(2, 3)}


def test_tensors_survive_and_their_bytes_do_not_depend_on_the_order() -> None:
    data = encode_tensors(ARRAYS, {"round": "1"})
    assert data == encode_tensors(dict(reversed(ARRAYS.items())), {"round": "1"})
    decoded = decode_tensors(data)
    assert decoded["b"].shape == ()
    np.testing.assert_array_equal(decoded["a"], ARRAYS["a"])
    assert tensor_metadata(data) == {"round": "1"}


def test_tensors_that_do_not_fit_their_specification_are_refused() -> None:
    spec = samples.TENSORS[0]
    good = np.zeros(spec.shape, np.float32)
    assert decode_tensors(encode_tensors({spec.name: good}), [spec])
    for wrong in ({spec.name: good.T}, {spec.name: good.astype(np.float64)}, {"other": good}, {}):
        with pytest.raises(ShapeError):
            decode_tensors(encode_tensors(wrong), [spec])


def test_junk_and_oversized_tensor_files_are_refused() -> None:
    with pytest.raises(IntegrityError, match="at most"):
        decode_tensors(encode_tensors(ARRAYS), max_bytes=10)
    for junk in (b"", b"\x00" * 7, b"\xff" * 64, encode_tensors(ARRAYS)[:-3]):
        with pytest.raises(IntegrityError, match="safetensors"):
            decode_tensors(junk)


def test_nan_is_found_and_named() -> None:
    with pytest.raises(ShapeError, match="tensor bad"):
        check_finite({"good": np.ones(3), "bad": np.array([1.0, np.nan])})


def test_the_schema_hash_sees_roles_and_shapes_but_not_order() -> None:
    first, second = samples.TENSORS[:2]
    assert schema_hash([first, second]) == schema_hash([second, first])
    assert schema_hash([first]) != schema_hash([first, second])


def test_a_digest_has_one_form() -> None:
    assert parse_digest(digest_of(b"")) == digest_of(b"")
    for text in ("sha256:12", "md5:" + "0" * 64, digest_of(b"").upper(), digest_of(b"") + "0"):
        with pytest.raises(IntegrityError, match="digest"):
            parse_digest(text)


@given(
    st.from_regex(NAME_PATTERN, fullmatch=True),
    st.from_regex(NAME_PATTERN, fullmatch=True),
    st.sampled_from(TopicKind),
)
def test_format_and_parse_of_a_topic_are_inverses(tenant: str, device: str, kind: TopicKind) -> None:
    assert parse_topic(str(Topic(tenant, device, kind))) == Topic(tenant, device, kind)
    assert parse_topic(str(Command(tenant, device, "restart"))) == Command(tenant, device, "restart")


@given(st.text(max_size=80))
def test_a_text_that_parses_as_topic_is_the_text_that_the_topic_formats_to(text: str) -> None:
    try:
        topic = parse_topic(text)
    except ProtocolError:
        return
    assert str(topic) == text


@pytest.mark.parametrize("name", ["", "Anna", "a_b", "+", "#", "a/b", "-a", "a" * 65, "ä"])
def test_names_that_could_reach_other_topics_are_refused(name: str) -> None:
    with pytest.raises(ProtocolError):
        Topic("home", name, TopicKind.STATUS)
    if name != "+":
        with pytest.raises(ProtocolError):
            subscription(TopicKind.STATUS, "home", name)


def test_the_topic_table() -> None:
    assert str(Topic("home", "anna-1", TopicKind.WINDOW)) == "wearfleet/v1/home/anna-1/tele/window"
    assert subscription(TopicKind.PREDICTION) == "wearfleet/v1/+/+/tele/prediction"


def test_random_keys_and_window_orders_never_change() -> None:
    assert [rng_key(11, 1, 0, step) for step in range(3)] == [rng_key(11, 1, 0, step) for step in range(3)]
    assert (rng_key(0, 0, 0, 0), rng_key(11, 2, 1, 5)) == (GOLDEN_KEYS[0], GOLDEN_KEYS[1])
    np.testing.assert_array_equal(shuffle_order(11, 1, 0, 8), GOLDEN_ORDER)


def test_keys_are_spread_over_their_range() -> None:
    keys = np.array([rng_key(3, r, p, s) for r in range(10) for p in range(3) for s in range(100)])
    assert len(np.unique(keys)) == len(keys)
    assert keys.min() >= 0
    assert keys.max() < 2**31
    assert abs(keys.mean() / 2**31 - 0.5) < 4 / np.sqrt(
        12 * len(keys)
    )  # four standard errors of a uniform mean


def test_an_epoch_visits_every_window_once_and_stops_at_the_step_limit() -> None:
    parts = list(batches(Loop("train", 4, 2, 0, shuffle=True), 5, 1, 10))
    assert [len(p) for p in parts] == [4, 4, 2, 4, 4, 2]
    assert sorted(np.concatenate(parts[:3])) == list(range(10))
    assert not np.array_equal(np.concatenate(parts[:3]), np.concatenate(parts[3:]))
    assert [len(p) for p in batches(Loop("train", 4, 2, 4, shuffle=False), 5, 1, 10)] == [4, 4, 2, 4]
    assert list(batches(Loop("train", 4, 1, 0, shuffle=True), 5, 1, 0)) == []


GOLDEN_KEYS = (278411845, 1216135886)
GOLDEN_ORDER = [7, 1, 4, 5, 3, 2, 0, 6]


ALL_TYPES = {
    f"{name}.{number}": (np.arange(6).reshape(2, 3) % 2).astype(name)
    for number, name in enumerate(("bool", "uint8", "float16", "int32", "float32", "float64", "int64"))
} | {"a": np.array(3.5, np.float32), "none": np.zeros((0, 4), np.float32), 'é"\\\n': np.ones(1, np.int64)}


def test_tensors_are_written_as_safetensors_writes_them():
    assert encode_tensors(ALL_TYPES, {"round": "1"}) == save(ALL_TYPES, {"round": "1"})


def test_tensors_that_safetensors_wrote_are_read_as_views():
    data = save(ALL_TYPES)
    decoded = decode_tensors(data)
    assert decoded.keys() == ALL_TYPES.keys()
    for name, array in ALL_TYPES.items():
        np.testing.assert_array_equal(decoded[name], array, strict=True)
        assert array.size == 0 or np.shares_memory(decoded[name], np.frombuffer(data, np.uint8))


def _file(header, values=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


@pytest.mark.parametrize(
    "data",
    [
        _file(b"[" * 100_000),
        _file([1]),
        _file({"a": 1}),
        _file({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
        _file({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, bytes(4)),
        _file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(8)),
        _file({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4)),
        _file({"a": {"dtype": "F32", "shape": [10**30, 10**30], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\x07"),
    ],
)
def test_a_damaged_tensor_file_is_an_integrity_error(data):
    with pytest.raises(IntegrityError):
        decode_tensors(data)
