"""Ed25519 signatures over canonical documents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from wearfleet_protos.canonical import MAX_DOCUMENT_BYTES
from wearfleet_protos.errors import IntegrityError
from wearfleet_protos.v1 import document_pb2

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["MAX_SIGNED_BYTES", "key_id_of", "sign", "verify"]

MAX_SIGNED_BYTES: Final = MAX_DOCUMENT_BYTES + 4096
"""Largest signed document that is read, in bytes."""

_CONTEXT: Final = b"wearfleet-signed-v1\n"


def key_id_of(public_key: bytes) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a raw Ed25519 public key."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def sign(payload: bytes, key: Ed25519PrivateKey, media_type: str) -> bytes:
    """Wrap ``payload`` in a signed document.

    Returns:
        Serialised ``SignedDocument``; equal inputs give equal bytes.
    """
    document = document_pb2.SignedDocument(
        media_type=media_type,
        payload=payload,
        key_id=key_id_of(key.public_key().public_bytes_raw()),
        signature=key.sign(_message(media_type, payload)),
    )
    return document.SerializeToString(deterministic=True)


def verify(
    data: bytes, keys: Mapping[str, bytes], media_type: str, max_bytes: int = MAX_SIGNED_BYTES
) -> bytes:
    """Return the payload of a signed document after checking its type and signature.

    Args:
        data: serialised ``SignedDocument``.
        keys: trusted raw public keys by key id.
        media_type: what the document must be.
        max_bytes: refuse anything larger.

    Raises:
        IntegrityError: too large, unreadable, of another type, signed by an unknown key, or changed.
    """
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  slow to import, not always needed
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    if len(data) > max_bytes:
        raise IntegrityError(f"signed document has {len(data)} bytes, at most {max_bytes} are accepted")
    try:
        document = document_pb2.SignedDocument.FromString(data)
    except DecodeError as error:
        raise IntegrityError(f"not a signed document ({error}); fetch it again") from error
    if document.media_type != media_type:
        raise IntegrityError(f"expected a document of type {media_type}, got {document.media_type!r}")
    key = keys.get(document.key_id)
    if key is None:
        raise IntegrityError(f"signed by unknown key {document.key_id!r}; trusted are {sorted(keys)}")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(
            document.signature, _message(media_type, document.payload)
        )
    except (InvalidSignature, ValueError) as error:
        raise IntegrityError(f"signature of the {media_type} document is wrong: it was changed") from error
    return document.payload


def _message(media_type: str, payload: bytes) -> bytes:
    return _CONTEXT + media_type.encode() + b"\n" + payload
