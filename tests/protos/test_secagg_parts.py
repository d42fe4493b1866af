"""The parts of secure aggregation: shares, quantiser, masks, sealed shares, graph, identities, parameters."""

from __future__ import annotations

import datetime as dt
import os
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from secure_rounds import Group, names, parameters
from wearfleet_cloud.fleet.identity import Authority
from wearfleet_protos.errors import AggregationError, ConfigError, IntegrityError, ProtocolError, ShapeError
from wearfleet_protos.secagg.identity import CertificateSigner, CertificateVerifier
from wearfleet_protos.secagg.keys import (
    mask_stream,
    open_sealed,
    pair_mask_key,
    public_key,
    seal,
    self_mask_key,
)
from wearfleet_protos.secagg.parameters import (
    MODULUS,
    check_overflow,
    default_neighbours,
    default_threshold,
    largest_weight_levels,
)
from wearfleet_protos.secagg.quantiser import mean_of, weighted_words
from wearfleet_protos.secagg.shamir import PRIME, SECRET_BYTES, join, split
from wearfleet_protos.secagg.vectors import flat, size_of, tensors_of
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

BINDING = bytes(32)


def is_prime(number: int, rounds: int = 40) -> bool:
    """Miller and Rabin; a composite passes with a chance of at most 4^-rounds."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, rounds + 2):
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        if not any((power := power * power % number) == number - 1 for _ in range(twos - 1)):
            return False
    return True


def test_the_field_is_one_and_holds_every_secret() -> None:
    assert is_prime(PRIME)
    assert not is_prime(PRIME - 2)
    assert PRIME > 2 ** (8 * SECRET_BYTES)


@given(st.binary(min_size=32, max_size=32))
def test_any_threshold_of_shares_gives_the_secret(secret: bytes) -> None:
    shares = split(secret, range(1, 6), 3, os.urandom)
    for chosen in combinations(shares, 3):
        assert join({place: shares[place] for place in chosen}, 3) == secret
    assert join(shares, 3) == secret


def test_shares_are_values_of_a_polynomial_whose_value_at_zero_is_the_secret() -> None:
    """The definition, with coefficients that are known: f(x) = 7 + 5 x + 3 x^2."""
    numbers = iter((5, 3))
    shares = split((7).to_bytes(32, "big"), (1, 2, 10), 3, lambda size: next(numbers).to_bytes(size, "big"))
    assert {x: int.from_bytes(y, "big") for x, y in shares.items()} == {1: 15, 2: 29, 10: 357}


def test_fewer_shares_fit_every_secret() -> None:
    """With t - 1 shares each secret is explained by exactly one share at a further place: nothing is learned."""
    shares = split(os.urandom(32), range(1, 4), 3, os.urandom)
    for guess in (0, 1, 2**255):
        # the polynomial through (0, guess), (1, .), (2, .) at 3, by Lagrange: 1 g - 3 y1 + 3 y2
        y1, y2 = (int.from_bytes(shares[x], "big") for x in (1, 2))
        third = (guess - 3 * y1 + 3 * y2) % PRIME
        assert join({1: shares[1], 2: shares[2], 3: third.to_bytes(33, "big")}, 3) == guess.to_bytes(
            32, "big"
        )


def test_too_few_or_damaged_shares_are_refused_and_a_wrong_one_gives_another_secret() -> None:
    secret = os.urandom(32)
    shares = split(secret, range(1, 4), 2, os.urandom)
    with pytest.raises(ProtocolError, match="2 shares"):
        join({1: shares[1]}, 2)
    with pytest.raises(ProtocolError, match="number of the field"):
        join({1: shares[1], 2: b"\xff" * 33}, 2)
    wrong = (int.from_bytes(shares[1], "big") ^ 1).to_bytes(33, "big")
    assert _joined({1: wrong, 2: shares[2]}) != secret
    for points, threshold in (((1, 1), 2), ((0, 1), 2), ((1,), 2), ((1, 2), 0)):
        with pytest.raises(ProtocolError):
            split(secret, points, threshold, os.urandom)


def _joined(shares: dict[int, bytes]) -> bytes:
    """What two shares give; empty when that is no secret of 32 bytes."""
    try:
        return join(shares, 2)
    except ProtocolError:
        return b""


def test_the_quantiser_is_unbiased_and_its_error_below_one_step() -> None:
    """4 000 draws: the mean error has a deviation of at most step / 2 / sqrt(4000); five of them bound it."""
    chosen = parameters(3, 6, levels=16, weight_levels=1, max_examples=1)
    values = np.array([-0.5, -0.499, -0.123, 0.0, 0.31, 0.5])
    step = 2 * chosen.clip / chosen.levels
    generator = np.random.default_rng(3)
    means = []
    for _ in range(4000):
        words = weighted_words(values, 1, chosen, generator.random(6))
        mean, weight = mean_of(words, 1, chosen)
        assert weight == 1
        assert np.abs(mean - values).max() < step
        means.append(mean)
    assert np.abs(np.mean(means, axis=0) - values).max() < 5 * step / 2 / np.sqrt(4000)


def test_values_beyond_the_clip_are_cut_and_bad_ones_refused() -> None:
    chosen = parameters(3, 2, weight_levels=7, max_examples=7)
    words = weighted_words(np.array([-9.0, 9.0]), 7, chosen, np.array([0.999, 0.999]))
    assert words.tolist() == [0, 7 * chosen.levels, 7]
    for bad in (np.array([np.nan, 0.0]), np.zeros(3)):
        with pytest.raises(ShapeError):
            weighted_words(bad, 1, chosen, np.zeros_like(bad))


def test_a_sum_that_no_members_can_give_is_refused() -> None:
    chosen = parameters(3, 2, weight_levels=10, max_examples=10)
    for words in ([0, 0, 2], [0, 0, 31], [5 * chosen.levels + 1, 0, 5]):
        with pytest.raises(AggregationError):
            mean_of(np.array(words, np.uint32), 3, chosen)


@given(st.integers(2, 5000), st.integers(1, 2**20))
def test_the_overflow_law_is_sharp(members: int, levels: int) -> None:
    fits = largest_weight_levels(members, levels)
    assert members * fits * levels < MODULUS <= members * (fits + 1) * levels
    check_overflow(members, fits, levels)
    with pytest.raises(ConfigError, match=f"at most {fits} weight levels"):
        check_overflow(members, fits + 1, levels)


def test_parameters_that_could_wrap_or_are_too_weak_are_refused() -> None:
    for changes in (
        {"levels": 2**24},
        {"threshold": 3},
        {"threshold": 7},
        {"neighbours": 3, "threshold": 2},
        {"neighbours": 7},
        {"members": (*names(6)[::-1], "a")},
        {"members": ("a", "a\nb", "c", "d", "e", "f", "g")},
        {"clip": 0.0},
        {"weight_levels": 0},
        {"round": 0},
        {"size": 0},
    ):
        with pytest.raises(ProtocolError):
            parameters(7, **{"size": 4, **changes})
    assert parameters(7, 4).threshold == 4


def test_every_parameter_changes_the_binding() -> None:
    base = parameters(7, 4)
    others = [
        parameters(7, 4, **change)
        for change in (
            {"run_id": "other"}, {"round": 2}, {"threshold": 5}, {"clip": 0.25}, {"levels": 2**15}, {"graph_seed": 6},
            {"weight_levels": 999}, {"max_examples": 1001}, {"neighbours": 4, "threshold": 3},
            {"members": (*names(6), "device-xx")},
        )
    ]  # fmt: skip
    bindings = {other.binding() for other in [base, parameters(7, 5), *others]}
    assert len(bindings) == len(others) + 2
    assert parameters(7, 4).binding() == base.binding()


@pytest.mark.parametrize(("members", "k"), [(7, 6), (7, 4), (8, 7), (30, 16), (100, 20), (3, 2), (2, 1)])
def test_neighbours_are_mutual_and_so_many(members: int, k: int) -> None:
    chosen = parameters(members, 1, neighbours=k, weight_levels=1, max_examples=1)
    graph = {name: chosen.neighbours_of(name) for name in chosen.members}
    for name, others in graph.items():
        assert len(others) == k
        assert name not in others
        assert all(name in graph[other] for other in others)
    reached = {chosen.members[0]}
    while (further := reached.union(*(graph[name] for name in reached))) != reached:
        reached = further
    assert reached == set(chosen.members)


def test_the_defaults_are_those_of_the_specification() -> None:
    """k counts a member's own share in the specification (21 of 100, 31 of 1 000), here only its neighbours'."""
    assert [default_neighbours(m) for m in (2, 7, 100, 1000)] == [1, 6, 20, 30]
    assert [default_threshold(k) for k in (1, 2, 3, 6, 20)] == [1, 2, 2, 4, 14]


def test_both_ends_of_a_pair_get_one_key_and_nobody_else_does() -> None:
    a, b, c = os.urandom(32), os.urandom(32), os.urandom(32)
    key = pair_mask_key(a, public_key(b), BINDING, ("a", "b"))
    assert key == pair_mask_key(b, public_key(a), BINDING, ("b", "a"))
    others = {
        pair_mask_key(c, public_key(b), BINDING, ("a", "b")),
        pair_mask_key(a, public_key(b), b"\x01" * 32, ("a", "b")),
        pair_mask_key(a, public_key(b), BINDING, ("a", "c")),
        self_mask_key(a, BINDING, "a"),
    }
    assert len(others) == 4
    assert key not in others
    with pytest.raises(ProtocolError, match="X25519"):
        pair_mask_key(a, bytes(32), BINDING, ("a", "b"))


def test_a_mask_stream_looks_uniform() -> None:
    """2^18 words in 256 cells by their first and by their last byte: Pearson's chi-square has 255 degrees of freedom.

    Below 390 with a chance of more than 1 - 1e-7; the stream is fixed, so the test never fails by chance.
    """
    words = mask_stream(bytes(range(32)), 2**18)
    expected = 2**18 / 256
    for shift in (0, 24):
        counts = np.bincount((words >> np.uint32(shift)) & 0xFF, minlength=256)
        assert ((counts - expected) ** 2 / expected).sum() < 390
    planted = words & np.uint32(0xFFFF_FFFE)  # one bit stuck
    counts = np.bincount(planted & 0xFF, minlength=256)
    assert ((counts - expected) ** 2 / expected).sum() > 390


def test_a_mask_stream_is_chacha20_of_its_standard() -> None:
    """RFC 8439, A.1, test vector 1: key 0, nonce 0, counter 0."""
    assert mask_stream(bytes(32), 4).tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_sealed_shares_open_only_where_they_belong() -> None:
    a, b = os.urandom(32), os.urandom(32)
    sealed = seal(a, public_key(b), BINDING, ("a", "b"), b"secret")
    assert open_sealed(b, public_key(a), BINDING, ("a", "b"), sealed) == b"secret"
    for secret, binding, route, data in (
        (os.urandom(32), BINDING, ("a", "b"), sealed),
        (b, b"\x01" * 32, ("a", "b"), sealed),
        (b, BINDING, ("b", "a"), sealed),
        (b, BINDING, ("a", "b"), sealed[:-1] + bytes([sealed[-1] ^ 1])),
    ):
        with pytest.raises(IntegrityError):
            open_sealed(secret, public_key(a), binding, route, data)


def test_vectors_leave_counters_out_and_come_back() -> None:
    specs = (
        TensorSpec("bn.count", "int64", (), TensorRole.COUNTER, TensorGroup.BUFFER),
        TensorSpec("head.w", "float32", (2, 3), TensorRole.HEAD, TensorGroup.PARAM),
        TensorSpec("scale", "float32", (), TensorRole.SHARED, TensorGroup.PARAM),
    )
    update = {
        "bn.count": np.int64(4),
        "head.w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scale": np.float32(9).reshape(()),
    }
    vector = flat(specs, update)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 9]
    assert size_of(specs) == 7
    back = tensors_of(specs, vector)
    np.testing.assert_array_equal(back["head.w"], update["head.w"])
    assert (back["bn.count"], back["scale"]) == (0, 9)
    assert [back[s.name].dtype for s in specs] == [np.int64, np.float32, np.float32]
    with pytest.raises(ShapeError):
        flat(specs, {"head.w": np.zeros((3, 2)), "scale": np.zeros(())})
    with pytest.raises(ShapeError):
        tensors_of(specs, np.zeros(8))


def certificate_of(folder: Path, name: str, now: dt.datetime) -> tuple[Authority, CertificateSigner]:
    authority, key = Authority(folder), ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "anything")])
    from cryptography.hazmat.primitives import hashes, serialization

    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    issued = authority.issue(request.public_bytes(serialization.Encoding.DER), name, "home", now)
    leaf = x509.load_pem_x509_certificates(issued.chain_pem)[0]
    return authority, CertificateSigner(key, leaf.public_bytes(serialization.Encoding.DER))


def test_a_device_certificate_shows_whose_signature_it_is(tmp_path: Path) -> None:
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    authority, signer = certificate_of(tmp_path / "a", "anna-0001", now)
    _, foreign = certificate_of(tmp_path / "b", "anna-0001", now)
    root = x509.load_pem_x509_certificate(authority.ca_pem)
    verifier = CertificateVerifier(root, lambda: now)
    signature = signer.sign(b"message")
    verifier.verify("anna-0001", signer.credential, signature, b"message")
    for member, credential, signed, message in (
        ("anna-0001", signer.credential, signature, b"another"),
        ("ben-0002", signer.credential, signature, b"message"),
        ("anna-0001", foreign.credential, foreign.sign(b"message"), b"message"),
        ("anna-0001", b"no certificate", signature, b"message"),
        ("anna-0001", bytes(9000), signature, b"message"),
    ):
        with pytest.raises(IntegrityError):
            verifier.verify(member, credential, signed, message)
    late = CertificateVerifier(root, lambda: now + dt.timedelta(days=31))
    with pytest.raises(IntegrityError, match="not valid now"):
        late.verify("anna-0001", signer.credential, signature, b"message")


def test_known_keys_refuse_another_key_and_another_message() -> None:
    group = Group.of(("a", "b"))
    signature = group.signers["a"].sign(b"message")
    group.verifier.verify("a", group.signers["a"].credential, signature, b"message")
    for member, credential, message in (
        ("a", group.signers["a"].credential, b"another"),
        ("a", group.signers["b"].credential, b"message"),
        ("c", group.signers["a"].credential, b"message"),
    ):
        with pytest.raises(IntegrityError):
            group.verifier.verify(member, credential, signature, message)
