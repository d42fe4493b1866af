"""Differences of downloads: whatever a device holds, it gets the service's tensors to the bit, or an error."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wearfleet_protos.codecs import FLOAT32, MOST_STEPS, DownloadFormat, UpdateCodec, frozen_bytes
from wearfleet_protos.errors import IntegrityError, ShapeError, WearfleetError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, encode_tensors

_PARAM, _BUFFER = TensorGroup.PARAM, TensorGroup.BUFFER
SPECS = (
    TensorSpec("control", "float32", (20, 20), TensorRole.AUX, TensorGroup.AUX),
    TensorSpec("empty", "float32", (0,), TensorRole.SHARED, _PARAM),
    TensorSpec("fc", "float32", (64, 40), TensorRole.SHARED, _PARAM),
    TensorSpec("fc.bias", "float32", (64,), TensorRole.SHARED, _PARAM),
    TensorSpec("frozen", "float32", (30, 30), TensorRole.FROZEN, _PARAM),
    TensorSpec("half", "float16", (5,), TensorRole.SHARED, _PARAM),
    TensorSpec("norm.count", "int64", (), TensorRole.COUNTER, _BUFFER),
    TensorSpec("norm.mean", "float32", (300,), TensorRole.NORM_STAT, _BUFFER),
    TensorSpec("used", "bool", (3,), TensorRole.SHARED, _BUFFER),
)
CODECS = {
    "difference": FLOAT32,
    "fp16": UpdateCodec("fp16"),
    "bf16": UpdateCodec("bf16"),
    "int8": UpdateCodec("int8"),
    "int4": UpdateCodec("int4"),
    "topk": UpdateCodec("topk", fraction=0.05),
    "randk": UpdateCodec("randk", fraction=0.05),
    "sign": UpdateCodec("sign"),
}


def formed(name: str) -> DownloadFormat:
    return DownloadFormat(SPECS, CODECS[name], 7)


def tensors_of(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for spec in SPECS:
        if spec.dtype == "bool":
            made[spec.name] = generator.random(spec.shape) > 0.5
        elif spec.dtype == "int64":
            made[spec.name] = np.array(generator.integers(-(2**62), 2**62), np.int64)
        else:
            made[spec.name] = generator.normal(0, scale, spec.shape).astype(spec.dtype)
    return made


def moved(old: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """What a round makes of tensors: small changes, but for what is frozen."""
    by = tensors_of(seed, 1e-3)
    floats = {s.name for s in SPECS if s.dtype in ("float32", "float16") and s.role != TensorRole.FROZEN}
    return {
        n: (a + by[n] if n in floats else a if n == "frozen" else by[n]).astype(a.dtype)
        for n, a in old.items()
    }


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return encode_tensors(one) == encode_tensors(other)


class Service:
    """The versions that devices were shown, and the steps between them."""

    def __init__(self, name: str) -> None:
        self.form = formed(name)
        self.exact = tensors_of(0)
        self.shown, self.steps = [self.exact], list[bytes]()

    def fold(self) -> None:
        self.exact = moved(self.exact, len(self.shown))
        step, shown = self.form.step(self.shown[-1], self.exact, len(self.shown))
        self.steps.append(step)
        self.shown.append(shown)

    def sent(self, version: int | None) -> bytes:
        """To a device that holds a version, or frozen tensors alone, or (None) nothing."""
        newest = self.shown[-1]
        if version is None:
            return self.form.join([self.form.exact({}, newest)])
        steps = self.steps[version:]
        if len(steps) > MOST_STEPS:
            return self.form.join([self.form.exact({"frozen": newest["frozen"]}, newest)])
        return self.form.join(steps)


@pytest.mark.parametrize("name", CODECS)
@given(history=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=14))
@settings(max_examples=15, deadline=None)
def test_any_history_of_absence_and_loss_leads_to_the_services_tensors(
    name: str, history: list[tuple[bool, bool]]
) -> None:
    service = Service(name)
    held: tuple[int, dict[str, np.ndarray]] | None = None
    for present, lost in history:
        service.fold()
        if lost:
            held = None
        if not present:
            continue
        data = service.sent(None if held is None else held[0])
        has = {} if held is None else held[1]
        if held is not None and len(service.shown) - 1 - held[0] > MOST_STEPS:
            has = {"frozen": has["frozen"]}
        got = service.form.apply(has, data)
        assert same(got, service.shown[-1])
        held = len(service.shown) - 1, got


@pytest.mark.parametrize("seed", range(3))
def test_an_exact_difference_is_the_whole_to_the_bit_whatever_the_bits_are(seed: int) -> None:
    form, generator = formed("difference"), np.random.default_rng(seed)
    old, new = ({}, {})
    for spec in SPECS:
        for side in (old, new):
            bits = generator.integers(0, 256, spec.size_bytes, np.uint8)
            kind = np.bool_ if spec.dtype == "bool" else np.dtype(spec.dtype)
            side[spec.name] = (
                (bits & 1).astype(kind) if kind is np.bool_ else bits.view(kind).reshape(spec.shape)
            )
    got = form.apply(old, form.join([form.exact(old, new)]))
    for spec in SPECS:  # NaN, infinities and subnormal numbers are among them
        assert got[spec.name].tobytes() == new[spec.name].tobytes()
        assert got[spec.name].dtype == np.dtype(spec.dtype)
    step, shown = form.step(old, new, 1)
    assert all(shown[s.name].tobytes() == new[s.name].tobytes() for s in SPECS)
    assert form.join([step]) == form.join([form.exact(old, new)])


def test_what_does_not_change_is_not_sent() -> None:
    form, old = formed("int8"), tensors_of(0)
    step, shown = form.step(old, dict(old), 3)
    assert same(shown, old)
    assert len(form.join([step])) == 4 + 1 + 4 + 2 + 4, "magic, count, length, bits, length of the coded part"
    with_frozen = form.exact({}, old)
    without = form.exact({"frozen": old["frozen"]}, old)
    # 900 normal numbers: 24 random bits each of 32 cannot be packed
    assert len(with_frozen) - len(without) > 900 * 3


@pytest.mark.parametrize("name", [n for n in CODECS if n != "difference"])
def test_what_a_step_loses_is_in_the_next_one(name: str) -> None:
    form, shown = formed(name), tensors_of(0)
    exact = moved(shown, 1)
    errors = []
    for number in range(1, 30):  # the exact tensors stay: each step sends what is missing
        _, shown = form.step(shown, exact, number)
        errors.append(float(np.linalg.norm(shown["fc"] - exact["fc"])))
        for spec in SPECS:
            if spec.name != "fc":
                np.testing.assert_array_equal(shown[spec.name], exact[spec.name])
    assert errors[-1] < 0.75 * errors[0] or errors[-1] < 1e-6 * float(np.linalg.norm(exact["fc"]))


def test_small_changes_are_small_and_a_held_frozen_part_has_a_name() -> None:
    form, old = formed("difference"), tensors_of(0, 0.1)
    new = {n: (a * np.float32(1 + 1e-4) if n == "fc" else a) for n, a in old.items()}
    # 2560 numbers whose last 11 of 24 bits move: less than 3 of 4 bytes each
    assert len(form.join([form.exact(old, new)])) < 2560 * 3
    assert frozen_bytes(SPECS, old) == encode_tensors({"frozen": old["frozen"]})
    small = tuple(s for s in SPECS if s.role != TensorRole.FROZEN)
    assert frozen_bytes(small, old) == b""


def test_every_cut_or_flipped_difference_is_refused_or_leads_elsewhere() -> None:
    for name in ("difference", "topk", "sign"):
        service = Service(name)
        service.fold()
        data, old, wanted = service.sent(0), service.shown[0], service.shown[1]
        for end in range(0, len(data), 97):
            with pytest.raises(IntegrityError):
                service.form.apply(old, data[:end])
        with pytest.raises(IntegrityError):
            service.form.apply(old, data + b"\0")
        for at in range(0, len(data), 41):
            bad = bytearray(data)
            bad[at] ^= 0x10
            try:
                got = service.form.apply(old, bytes(bad))
            except WearfleetError:
                continue
            assert {n: (a.shape, a.dtype) for n, a in got.items()} == {
                n: (a.shape, a.dtype) for n, a in wanted.items()
            }


def step_of(bits: bytes, coded: bytes, exact: bytes) -> bytes:
    body = bits + len(coded).to_bytes(4, "little") + coded + exact
    return b"wfd1\x01" + len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"wfu1" + bytes(20), "begins with"),
        (b"wfd1" + bytes([MOST_STEPS + 1]), "at most 8 steps"),
        (b"wfd1\x01\xff\xff\xff\xff", "ends at byte"),
        (step_of(b"\x04\x00", b"", zlib.compress(bytes(64 * 40 * 4 + 1))), "does not unpack"),
        (step_of(b"\x04\x00", b"", zlib.compress(bytes(1 << 26))), "does not unpack"),
        (step_of(b"\x04\x00", b"", zlib.compress(bytes(64 * 40 * 4))[:-3]), "does not unpack"),
        (step_of(b"\x04\x00", b"", zlib.compress(bytes(64 * 40 * 4)) + b"x"), "does not unpack"),
        (step_of(b"\x04\x00", b"", b"not zlib"), "cannot be unpacked"),
        (step_of(b"\x00\x00", b"", b"x"), "do not change"),
        (step_of(b"\x01\x00", b"coded", b""), "nothing that this plan codes"),
        (step_of(b"\x00\x01", b"", zlib.compress(bytes([8, 8, 8]))), "truth value"),
    ],
)
def test_bytes_that_are_no_difference_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(IntegrityError, match=reason):
        formed("sign").apply({}, data)


def test_held_tensors_of_another_model_are_refused() -> None:
    form = formed("difference")
    with pytest.raises(ShapeError, match="held tensor fc"):
        form.apply({"fc": np.zeros((3, 3), np.float32)}, form.join([]))
