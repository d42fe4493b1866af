"""Codecs of updates: unbiased or paid back, of the size they say, and never fooled by bytes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wearfleet_protos.codecs import (
    FEEDBACK,
    FLOAT32,
    PARAMETERS,
    Residual,
    Turn,
    UpdateCodec,
    UpdateFormat,
    is_coded,
)
from wearfleet_protos.codecs.family import Reader
from wearfleet_protos.codecs.linear import BLOCK, Int4, Int8
from wearfleet_protos.codecs.low_rank import PowerSgd
from wearfleet_protos.codecs.sparse import places_of_all
from wearfleet_protos.errors import IntegrityError, ProtocolError, ShapeError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, encode_tensors

_PARAM, _BUFFER = TensorGroup.PARAM, TensorGroup.BUFFER
SPECS = (
    TensorSpec("conv", "float32", (16, 3, 9), TensorRole.SHARED, _PARAM),
    TensorSpec("fc", "float32", (64, 40), TensorRole.SHARED, _PARAM),
    TensorSpec("fc.bias", "float32", (64,), TensorRole.SHARED, _PARAM),
    TensorSpec("head", "float32", (6, 64), TensorRole.HEAD, _PARAM),
    TensorSpec("norm.mean", "float32", (300,), TensorRole.NORM_STAT, _BUFFER),
    TensorSpec("norm.count", "int64", (), TensorRole.COUNTER, _BUFFER),
    TensorSpec("used", "bool", (3,), TensorRole.SHARED, _BUFFER),
    TensorSpec("control", "float32", (20, 20), TensorRole.AUX, TensorGroup.AUX),
)
CODED = {spec.name: spec.shape for spec in SPECS if is_coded(spec)}
PLAIN_BYTES = sum(spec.size_bytes for spec in SPECS if not is_coded(spec))
P = sum(math.prod(shape) for shape in CODED.values())
CODECS = {
    "fp16": UpdateCodec("fp16"),
    "bf16": UpdateCodec("bf16"),
    "int8": UpdateCodec("int8"),
    "int4": UpdateCodec("int4"),
    "topk": UpdateCodec("topk", fraction=0.05),
    "randk": UpdateCodec("randk", fraction=0.05),
    "sign": UpdateCodec("sign"),
    "powersgd": UpdateCodec("powersgd", rank=2),
}
TURN = Turn(7, 3)
EPS = 2.0**-24
"""Half a unit in the last place of float32, relative."""


def update_of(seed: int, scale: float = 1e-3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    update = {
        spec.name: (scale * generator.standard_t(3, spec.shape)).astype(np.float32)
        for spec in SPECS
        if spec.dtype == "float32"
    }
    return {**update, "norm.count": np.array(41, np.int64), "used": np.array([True, False, True])}


def encoded(update, codec, residual=None, *, turn=TURN, client="a", specs=SPECS):
    return UpdateFormat(specs, codec, turn.seed).encode(
        update, residual or Residual(), round_number=turn.round_number, client=client
    )


def decoded(data, codec, specs=SPECS):
    return UpdateFormat(specs, codec, TURN.seed).decode(data)


def most_bytes(codec, specs=SPECS):
    return UpdateFormat(specs, codec, TURN.seed).most_bytes(TURN.round_number)


def sent(update, codec, residual=None, *, turn=TURN, client="a"):
    """What arrives, what is owed, and how many bytes it took."""
    made = encoded(update, codec, residual, turn=turn, client=client)
    return decoded(made.data, codec), made.residual, len(made.data)


def test_every_codec_is_tried_here() -> None:
    assert {*CODECS, "float32"} == PARAMETERS.keys()


@pytest.mark.parametrize("name", CODECS)
def test_small_tensors_statistics_counters_and_auxiliary_ones_arrive_to_the_bit(name: str) -> None:
    update = update_of(1)
    arrived, residual, _ = sent(update, CODECS[name])
    assert arrived.keys() == update.keys()
    for spec in SPECS:
        assert arrived[spec.name].dtype == np.dtype(spec.dtype)
        assert arrived[spec.name].shape == spec.shape
        if not is_coded(spec):
            np.testing.assert_array_equal(arrived[spec.name], update[spec.name])
    assert residual.owed.keys() == (CODED.keys() if name in FEEDBACK else set())


def test_float32_is_the_safetensors_that_older_devices_send() -> None:
    update = update_of(1)
    made = encoded(update, FLOAT32)
    assert made.data == encode_tensors(update)
    np.testing.assert_array_equal(decoded(made.data, FLOAT32)["fc"], update["fc"])


def test_sizes_are_those_of_the_table() -> None:
    blocks = sum(-(-math.prod(shape) // BLOCK) for shape in CODED.values())
    k = math.ceil(0.05 * P)
    low_rank = 2 * (16 + 27) + 2 * (64 + 40) + 2 * (6 + 64)
    wanted = {
        "fp16": 2 * P + 2 * len(CODED),
        "bf16": 2 * P,
        "int8": P + 4 * blocks,
        "int4": P // 2 + 4 * blocks,
        "randk": 2 * k + 2,
        "sign": P // 8 + 4 * len(CODED),
        "powersgd": 4 * low_rank,
    }
    for name, size in wanted.items():
        assert sent(update_of(1), CODECS[name])[2] == 8 + PLAIN_BYTES + size, name
        assert most_bytes(CODECS[name]) == 8 + PLAIN_BYTES + size, name
    # a sorted gap is 19 on average, below 128 nearly always: one byte beside two of the value
    assert sent(update_of(1), CODECS["topk"])[2] <= 8 + PLAIN_BYTES + 2 + 3.05 * k


@pytest.mark.parametrize(("kind", "levels"), [(Int8(), 127), (Int4(), 7)])
def test_stochastic_rounding_is_right_in_the_mean_and_never_off_by_more_than_a_level(kind, levels) -> None:
    draws = 10_000
    block = np.random.default_rng(2).standard_normal(BLOCK).astype(np.float32)
    step = float(np.abs(block).max()) / levels
    data = kind.encode(np.tile(block, draws), np.random.default_rng(3))
    assert len(data) == kind.size_bytes(draws * BLOCK)
    found = kind.decode(Reader(data), draws * BLOCK).reshape(draws, BLOCK).astype(np.float64)
    assert np.abs(found - block).max() <= step * (1 + 4 * EPS)
    # the error of one draw has a deviation of at most step / 2; 5 deviations of the mean for each of 256 numbers
    assert np.abs(found.mean(axis=0) - block).max() < 5 * step / 2 / math.sqrt(draws)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 511])
@pytest.mark.parametrize("kind", [Int8(), Int4()])
def test_any_length_and_any_size_of_numbers_survive_quantisation(kind, count: int) -> None:
    for scale in (0.0, 1e-44, 1e-30, 1.0, 1e37):
        values = (scale * np.linspace(-1, 1, count)).astype(np.float32)
        found = kind.decode(Reader(kind.encode(values, np.random.default_rng(1))), count)
        assert np.isfinite(found).all()
        # one level of the coarser grid is 1/7; a scale that is a denormal is rounded up by at most 2^-149
        assert np.abs(found - values).max() <= np.abs(values).max() / 7 * (1 + 4 * EPS) + 8 * 2.0**-149


def test_casts_are_as_close_as_their_bits() -> None:
    update = update_of(4)
    for name, bits in (("fp16", 11), ("bf16", 8)):
        arrived, _, _ = sent(update, CODECS[name])
        for tensor in CODED:
            largest = float(np.abs(update[tensor]).max())
            bound = np.abs(update[tensor]) * 2.0**-bits + 2 * largest * 2.0**-25
            assert (np.abs(arrived[tensor] - update[tensor]) <= bound).all(), (name, tensor)


def test_fp16_neither_overflows_nor_loses_small_updates() -> None:
    for scale in (1e-30, 1e30):
        update = update_of(4, scale)
        arrived, _, _ = sent(update, CODECS["fp16"])
        assert np.linalg.norm(arrived["fc"] / scale - update["fc"] / scale) < 2.0**-11 * np.linalg.norm(
            update["fc"] / scale
        )


def _of_few_bits(seed: int) -> dict[str, np.ndarray]:
    """An update whose numbers are multiples of 2^-12 below 2^-2: exact in 16 bits, and so are sums of a few."""
    generator = np.random.default_rng(seed)
    coded = {
        name: generator.integers(-1023, 1024, shape).astype(np.float32) / 4096
        for name, shape in CODED.items()
    }
    return update_of(seed) | coded


def test_topk_of_everything_is_the_identity() -> None:
    update = _of_few_bits(5)
    arrived, residual, _ = sent(update, UpdateCodec("topk", fraction=1.0))
    for name in CODED:
        np.testing.assert_array_equal(arrived[name], update[name])
        assert not residual.owed[name].any()


def test_topk_sends_the_largest() -> None:
    update = update_of(6)
    arrived, _, _ = sent(update, CODECS["topk"])
    row = np.concatenate([update[name].reshape(-1) for name in CODED])
    kept = np.concatenate([arrived[name].reshape(-1) for name in CODED]) != 0
    assert kept.sum() == math.ceil(0.05 * P)
    assert np.abs(row[kept]).min() >= np.abs(row[~kept]).max()


def test_topk_sends_the_first_of_equal_ones_on_every_processor() -> None:
    update = update_of(1)
    for seed, name in enumerate(CODED):
        signs = np.random.default_rng(seed).choice((-1.0, 1.0, 2.0), update[name].shape)
        update[name] = signs.astype(np.float32)
    row = np.concatenate([update[name].reshape(-1) for name in CODED])
    twos, ones = np.flatnonzero(row == 2.0), np.flatnonzero(row != 2.0)
    arrived, _, _ = sent(update, UpdateCodec("topk", fraction=(len(twos) + 40) / P))
    kept = np.flatnonzero(np.concatenate([arrived[name].reshape(-1) for name in CODED]))
    assert kept.tolist() == sorted([*twos, *ones[:40]])


def test_the_warm_up_goes_from_a_quarter_to_the_fraction() -> None:
    codec = UpdateCodec("topk", fraction=0.01, warmup_rounds=5)
    shares = [codec.count(100_000, number) / 100_000 for number in range(1, 8)]
    assert shares[0] == 0.25
    assert shares[5:] == [0.01, 0.01]
    ratios = np.array(shares[1:6]) / np.array(shares[:5])
    # counts are rounded up to a hundred-thousandth, at least 0.01: 1e-3 of them
    np.testing.assert_allclose(ratios, (0.01 / 0.25) ** (1 / 5), rtol=2e-3)
    assert UpdateCodec("topk", fraction=0.5, warmup_rounds=5).count(10, 1) == 5


@pytest.mark.parametrize("name", ["topk", "randk"])
def test_what_arrived_and_what_is_owed_are_all_updates_exactly(name: str) -> None:
    residual, total, came = Residual(), dict.fromkeys(CODED, 0.0), dict.fromkeys(CODED, 0.0)
    for number in range(1, 7):
        update = _of_few_bits(number)
        arrived, residual, _ = sent(update, CODECS[name], residual, turn=Turn(7, number))
        for tensor in CODED:
            total[tensor] = total[tensor] + update[tensor].astype(np.float64)
            came[tensor] = came[tensor] + arrived[tensor].astype(np.float64)
    for tensor in CODED:
        np.testing.assert_array_equal(came[tensor] + residual.owed[tensor], total[tensor])


@pytest.mark.parametrize("name", sorted(FEEDBACK))
def test_what_arrived_and_what_is_owed_are_all_updates_up_to_rounding(name: str) -> None:
    residual, total, came = Residual(), dict.fromkeys(CODED, 0.0), dict.fromkeys(CODED, 0.0)
    rounding = dict.fromkeys(CODED, 0.0)
    for number in range(1, 9):
        update = update_of(number)
        arrived, residual, _ = sent(update, CODECS[name], residual, turn=Turn(7, number))
        for tensor in CODED:
            total[tensor] = total[tensor] + update[tensor].astype(np.float64)
            came[tensor] = came[tensor] + arrived[tensor].astype(np.float64)
            size = np.abs(arrived[tensor]) + np.abs(residual.owed[tensor])
            rounding[tensor] = (
                rounding[tensor] + 3 * EPS * size
            )  # of u = d + e, of u - decoded, and of e itself
    for tensor in CODED:
        assert (np.abs(came[tensor] + residual.owed[tensor] - total[tensor]) <= rounding[tensor]).all()


def test_signs_have_the_mean_magnitude() -> None:
    update = update_of(8)
    arrived, _, _ = sent(update, CODECS["sign"])
    for name in CODED:
        np.testing.assert_array_equal(arrived[name] >= 0, update[name] >= 0)
        np.testing.assert_allclose(np.abs(arrived[name]), np.abs(update[name]).mean(dtype=float), rtol=EPS)


def _low_rank(shape: tuple[int, ...], rank: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    left, right = (
        generator.standard_normal((shape[0], rank)),
        generator.standard_normal((rank, math.prod(shape[1:]))),
    )
    return (left @ right).reshape(shape).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 2])
def test_powersgd_is_exact_on_matrices_of_its_rank(rank: int) -> None:
    update = update_of(9) | {name: _low_rank(shape, rank, 10) for name, shape in CODED.items()}
    arrived, _, _ = sent(update, CODECS["powersgd"])
    for name in CODED:
        # sums over up to 64 products in float32, and P and Q rounded to it
        error = np.linalg.norm(arrived[name] - update[name]) / np.linalg.norm(update[name])
        assert error < 64 * EPS, name


def test_powersgd_that_starts_warm_comes_to_the_best_approximation() -> None:
    matrix = np.random.default_rng(11).standard_normal((64, 40)) * 0.7 ** np.arange(40)
    tensors, family, memory = {"m": matrix.astype(np.float32)}, PowerSgd(2), {}
    best = math.sqrt((np.linalg.svd(matrix, compute_uv=False)[2:] ** 2).sum())
    errors = []
    for number in range(12):
        data, memory = family.encode(tensors, memory, np.random.default_rng(number))
        found = family.decode(Reader(data), {"m": (64, 40)})["m"]
        errors.append(float(np.linalg.norm(found - matrix)))
    # a step of power iteration takes (s3 / s2)^2, about 0.5, off the squared distance to the best: 2^-12 is left
    assert errors[0] > 1.01 * best
    assert best * (1 - 1e-4) <= errors[-1] < best * 1.001


def test_powersgd_recovers_from_an_update_of_zeros() -> None:
    zeros = update_of(1) | {name: np.zeros(shape, np.float32) for name, shape in CODED.items()}
    _, residual, _ = sent(zeros, CODECS["powersgd"], turn=Turn(7, 1))
    update = update_of(9) | {name: _low_rank(shape, 1, 10) for name, shape in CODED.items()}
    arrived, _, _ = sent(update, CODECS["powersgd"], residual, turn=Turn(7, 2))
    assert np.linalg.norm(arrived["fc"] - update["fc"]) < 64 * EPS * np.linalg.norm(update["fc"])


def _mixed(value: int) -> int:
    """SplitMix64's finaliser in plain integers."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


@given(st.integers(0, 2**64 - 1), st.integers(1, 300), st.data())
def test_places_of_all_are_those_of_the_slow_way(key: int, total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    wanted = sorted(sorted(range(total), key=lambda place: _mixed(place ^ key))[:count])
    assert places_of_all(key, total, count).tolist() == wanted


def test_randk_has_the_same_places_for_all_clients_and_others_in_the_next_round() -> None:
    def places(seed: int, turn: Turn, client: str) -> list[int]:
        arrived, _, _ = sent(update_of(seed), CODECS["randk"], turn=turn, client=client)
        return np.flatnonzero(np.concatenate([arrived[n].reshape(-1) for n in CODED])).tolist()

    assert places(1, TURN, "a") == places(2, TURN, "b")
    assert places(1, TURN, "a") == places_of_all(TURN.key, P, math.ceil(0.05 * P)).tolist()
    assert places(1, TURN, "a") != places(1, Turn(7, 4), "a")


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_client_rounds_the_same_way_again_and_others_differently(name: str) -> None:
    def data(client: str, turn: Turn) -> bytes:
        return encoded(update_of(1), CODECS[name], turn=turn, client=client).data

    assert data("a", TURN) == data("a", TURN)
    assert len({data("a", TURN), data("b", TURN), data("a", Turn(7, 4)), data("a", Turn(8, 3))}) == 4


def test_a_residual_survives_the_disk_and_damage_is_seen() -> None:
    _, residual, _ = sent(update_of(1), CODECS["powersgd"])
    data = residual.to_bytes()
    again = Residual.from_bytes(data)
    assert (again.purpose, again.round_number) == (residual.purpose, 3)
    for kept, back in ((residual.owed, again.owed), (residual.memory, again.memory)):
        assert kept.keys() == back.keys() == CODED.keys()
        for tensor, array in kept.items():
            np.testing.assert_array_equal(back[tensor], array)
    assert Residual().to_bytes() == b""
    assert Residual.from_bytes(b"").owed == {}
    bad = replace(residual, owed={"fc": np.full((64, 40), np.nan, np.float32)})
    for damaged in (data[:-1], encode_tensors({"owed/fc": np.ones(3, np.float32)}), bad.to_bytes()):
        with pytest.raises((IntegrityError, ShapeError)):
            Residual.from_bytes(damaged)


def test_what_is_owed_fades_with_missed_rounds_and_is_forgotten_in_the_end() -> None:
    _, residual, _ = sent(update_of(1), CODECS["topk"], turn=Turn(7, 3))
    for number, factor in ((4, 1.0), (5, 0.9), (7, 0.9**3), (24, 0.9**20), (3, 1.0)):
        owed, _ = residual.at(number, residual.purpose)
        np.testing.assert_allclose(
            owed["fc"], factor * residual.owed["fc"].astype(float), rtol=2 * EPS + 1e-7
        )
    assert residual.at(25, residual.purpose) == ({}, {})


@pytest.mark.parametrize("change", ["codec", "shape"])
def test_what_is_owed_is_forgotten_with_another_codec_or_model(change: str) -> None:
    _, residual, _ = sent(update_of(1), CODECS["topk"], turn=Turn(7, 3))
    codec, specs, update = CODECS["topk"], SPECS, update_of(2)
    if change == "codec":
        codec = UpdateCodec("topk", fraction=0.06)
    else:
        specs = (*SPECS[:-1], replace(SPECS[-1], name="more", shape=(30, 30), role=TensorRole.SHARED))
        update = {n: a for n, a in update.items() if n != "control"} | {"more": np.ones((30, 30), np.float32)}
    fresh = encoded(update, codec, Residual(), specs=specs)
    assert encoded(update, codec, residual, specs=specs).data == fresh.data


def test_an_update_that_is_not_finite_with_what_is_owed_is_refused() -> None:
    huge = update_of(1) | {"fc": np.full((64, 40), 3e38, np.float32)}
    _, residual, _ = sent(huge | {"fc": huge["fc"] * np.float32(0.9)}, CODECS["topk"])
    with pytest.raises(ShapeError, match="fc"):
        sent(huge, CODECS["topk"], residual, turn=Turn(7, 4))
    with pytest.raises(ShapeError):
        sent({**update_of(1), "fc": np.zeros((2, 2), np.float32)}, CODECS["int8"])


@pytest.mark.parametrize("name", CODECS)
def test_bytes_that_are_cut_off_or_go_on_are_refused(name: str) -> None:
    data = encoded(update_of(1), CODECS[name]).data
    for wrong in (data[:-1], data + b"\0", data[:4], b"", b"wfu2" + data[4:], data[:40] + data[60:]):
        with pytest.raises(IntegrityError):
            decoded(wrong, CODECS[name])


def test_bytes_are_refused_for_their_size_before_they_are_read() -> None:
    for codec in CODECS.values():
        most = most_bytes(codec)
        with pytest.raises(IntegrityError, match="at most"):
            decoded(b"wfu1\3\0\0\0" + bytes(most), codec)


DAMAGE = {
    "a scale that is negative": ("int8", np.array([-1.0], "<f4").tobytes(), 0, IntegrityError),
    "a scale that is not a number": ("sign", np.array([np.nan], "<f4").tobytes(), 0, IntegrityError),
    "a level below the lowest": ("int8", b"\x80", 8, IntegrityError),
    "a level of four bits below the lowest": ("int4", b"\x00", 8, IntegrityError),
    "an exponent beyond float32": ("fp16", b"\xff\x7f", 0, IntegrityError),
    "a place beyond the end": ("topk", b"\xff\xff\xff\x7f", -4, IntegrityError),
    "a gap without an end": ("topk", b"\xff", -1, IntegrityError),
    "a gap that is too long": ("topk", b"\x80\x80\x80\x80\x80", -6, IntegrityError),
    "a number that is infinite": ("bf16", b"\x80\x7f", 0, ShapeError),
    "a factor that is infinite": ("powersgd", np.array([np.inf], "<f4").tobytes(), 0, ShapeError),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_bytes_are_refused_for_what_they_are(case: str) -> None:
    name, damage, at, error = DAMAGE[case]
    update = update_of(1)
    data = bytearray(encoded(update, CODECS[name]).data)
    begin = 8 + PLAIN_BYTES + at if at >= 0 else len(data) + at
    data[begin : begin + len(damage)] = damage
    with pytest.raises(error):
        decoded(bytes(data), CODECS[name])


def test_a_truth_value_is_0_or_1() -> None:
    data = bytearray(encoded(update_of(1), CODECS["sign"]).data)
    data[8 + PLAIN_BYTES - 1] = 2  # "used" is the last of the plain ones by name
    with pytest.raises(IntegrityError, match="used"):
        decoded(bytes(data), CODECS["sign"])


@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", CODECS)
@given(st.data())
def test_any_bytes_are_refused_or_an_update_of_the_right_shapes(name: str, data: st.DataObject) -> None:
    good = encoded(update_of(1), CODECS[name]).data
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)) | st.just(len(good)))
    try:
        found = decoded(bytes(changed[:cut]), CODECS[name])
    except (IntegrityError, ShapeError):
        return
    for spec in SPECS:
        assert found[spec.name].shape == spec.shape
        assert spec.dtype != "float32" or np.isfinite(found[spec.name]).all()


@settings(deadline=None)
@given(st.binary(max_size=64), st.sampled_from(sorted(CODECS)))
def test_junk_is_refused(junk: bytes, name: str) -> None:
    with pytest.raises(IntegrityError):
        decoded(junk, CODECS[name])


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=50, unique=True))
def test_gaps_of_every_length_survive(places: list[int]) -> None:
    total = 2**20 + 1
    row = np.zeros(total, np.float32)
    row[places] = 1.0
    spec = TensorSpec("row", "float32", (total,), TensorRole.SHARED, _PARAM)
    codec = UpdateCodec("topk", fraction=len(places) / total)
    made = encoded({"row": row}, codec, specs=(spec,))
    np.testing.assert_array_equal(decoded(made.data, codec, (spec,))["row"], row)
    assert len(made.data) <= most_bytes(codec, (spec,))


def test_an_update_of_small_tensors_alone_has_nothing_to_code() -> None:
    spec = TensorSpec("bias", "float32", (4,), TensorRole.SHARED, _PARAM)
    update = {"bias": np.arange(4, dtype=np.float32)}
    for codec in CODECS.values():
        made = encoded(update, codec, specs=(spec,))
        assert (len(made.data), made.residual.purpose) == (24, "")
        np.testing.assert_array_equal(decoded(made.data, codec, (spec,))["bias"], update["bias"])


@pytest.mark.parametrize("codec", [FLOAT32, *CODECS.values(), UpdateCodec("topk", 0.01, warmup_rounds=5)])
def test_a_declaration_survives_its_document(codec: UpdateCodec) -> None:
    assert UpdateCodec.from_json(codec.to_json()) == codec


@pytest.mark.parametrize(
    "value",
    ["zip", "topk", 3, None, {"name": "topk"}, {"name": "zip"}, {"name": ["topk"]}, {"fraction": 0.1}]
    + [{"name": "topk", "fraction": f, "warmup_rounds": 0} for f in (0.0, -1.0, 1.1, math.nan)]
    + [{"name": "powersgd", "rank": 0}, {"name": "powersgd", "rank": 5000}, {"name": "int8", "rank": 2}]
    + [{"name": "topk", "fraction": 0.1, "warmup_rounds": -1}],
)
def test_a_codec_that_this_version_does_not_know_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError):
        UpdateCodec.from_json(value)
