"""Keys of a secure round: agreement (X25519), derivation (HKDF-SHA256), mask streams and sealed shares (ChaCha20)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from wearfleet_protos.errors import IntegrityError, ProtocolError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "KEY_BYTES",
    "commitment",
    "mask_stream",
    "open_sealed",
    "pair_mask_key",
    "public_key",
    "seal",
    "self_mask_key",
]

KEY_BYTES: Final = 32
_ONCE: Final = bytes(12)
"""Each key seals one message only, so its nonce need not change."""


def public_key(secret: bytes) -> bytes:
    """The public half (32 bytes) of a secret X25519 key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def commitment(seed: bytes) -> bytes:
    """(32 bytes) says nothing of a random seed, but shows later whether it was rebuilt rightly."""
    return hashlib.sha256(b"wearfleet-secagg-seed\n" + seed).digest()


def pair_mask_key(secret: bytes, public: bytes, binding: bytes, pair: tuple[str, str]) -> bytes:
    """The key of the mask that two members share in one round; both get the same.

    Args:
        secret: own mask key.
        public: the other's mask key.
        binding: of the round.
        pair: both names, in any order.

    Raises:
        ProtocolError: the public key is none.
    """
    return _derive(_agree(secret, public), b"pair", binding, *sorted(pair))


def self_mask_key(seed: bytes, binding: bytes, member: str) -> bytes:
    """The key of the mask that only one member has."""
    return _derive(seed, b"self", binding, member)


def mask_stream(key: bytes, size: int) -> NDArray[np.uint32]:
    """(size,) uint32, uniform: the key stream of ChaCha20, read in little-endian words."""
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * size)), "<u4")


def seal(secret: bytes, public: bytes, binding: bytes, route: tuple[str, str], plain: bytes) -> bytes:
    """Encrypt for one member; only it can read, and only as this sender's message of this round.

    Args:
        secret: the sender's channel key.
        public: the receiver's channel key.
        binding: of the round.
        route: names of sender and receiver.
        plain: one message; a second one needs new keys.

    Raises:
        ProtocolError: the public key is none.
    """
    key = _derive(_agree(secret, public), b"seal", binding, *route)
    return ChaCha20Poly1305(key).encrypt(_ONCE, plain, _names(binding, *route))


def open_sealed(secret: bytes, public: bytes, binding: bytes, route: tuple[str, str], sealed: bytes) -> bytes:
    """Inverse of :func:`seal`, with the receiver's secret and the sender's public channel key.

    Raises:
        IntegrityError: it is of another sender, receiver or round, or was changed.
        ProtocolError: the public key is none.
    """
    key = _derive(_agree(secret, public), b"seal", binding, *route)
    try:
        return ChaCha20Poly1305(key).decrypt(_ONCE, sealed, _names(binding, *route))
    except InvalidTag as error:
        raise IntegrityError(f"the shares of {route[0]} for {route[1]} were changed on the way") from error


def _agree(secret: bytes, public: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtocolError(f"not a usable X25519 public key: {error}") from error


def _derive(material: bytes, purpose: bytes, binding: bytes, *names: str) -> bytes:
    info = b"wearfleet-secagg-v1\n" + purpose + b"\n" + _names(binding, *names)
    return HKDF(hashes.SHA256(), KEY_BYTES, None, info).derive(material)


def _names(binding: bytes, *names: str) -> bytes:
    return binding + "\n".join(names).encode()
