"""Who signed: by a certificate of the fleet's authority, or by a list of known Ed25519 keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from wearfleet_protos.errors import IntegrityError

__all__ = ["CertificateSigner", "CertificateVerifier", "KnownKeySigner", "KnownKeys", "Signer", "Verifier"]

_MOST_CREDENTIAL_BYTES: Final = 8192


class Signer(Protocol):
    """Signs as one member."""

    @property
    def credential(self) -> bytes:
        """What others need to check its signatures."""

    def sign(self, message: bytes) -> bytes:
        """A signature."""


class Verifier(Protocol):
    """Checks signatures of members."""

    def verify(self, member: str, credential: bytes, signature: bytes, message: bytes) -> None:
        """Return when this member signed the message.

        Raises:
            IntegrityError: it did not, or the credential is not its own.
        """


@dataclass(frozen=True, slots=True)
class CertificateSigner:
    """Signs with the key of a certificate (DER): the device's own."""

    key: EllipticCurvePrivateKey
    credential: bytes

    def sign(self, message: bytes) -> bytes:
        """ECDSA with SHA-256."""
        return self.key.sign(message, ECDSA(hashes.SHA256()))


@dataclass(frozen=True, slots=True)
class CertificateVerifier:
    """Trusts certificates that the authority issued to the member's name and that are valid now.

    Args:
        authority: the root certificate.
        now: present time, UTC.
    """

    authority: x509.Certificate
    now: Callable[[], datetime]

    def verify(self, member: str, credential: bytes, signature: bytes, message: bytes) -> None:
        """See :class:`Verifier`."""
        key = self._key(member, credential)
        try:
            key.verify(signature, message, ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise IntegrityError(f"the signature of {member} is wrong") from error

    def _key(self, member: str, credential: bytes) -> EllipticCurvePublicKey:
        if len(credential) > _MOST_CREDENTIAL_BYTES:
            raise IntegrityError(f"the certificate of {member} has {len(credential)} bytes")
        try:
            certificate = x509.load_der_x509_certificate(credential)
            certificate.verify_directly_issued_by(self.authority)
            key = certificate.public_key()
        except (ValueError, TypeError, InvalidSignature) as error:
            raise IntegrityError(
                f"the certificate of {member} is not of this fleet's authority: {error}"
            ) from error
        names = [str(n.value) for n in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
        if names != [member] or not isinstance(key, EllipticCurvePublicKey):
            raise IntegrityError(f"expected a certificate of {member}, got one of {names}")
        if not certificate.not_valid_before_utc <= self.now() <= certificate.not_valid_after_utc:
            raise IntegrityError(f"the certificate of {member} is not valid now")
        return key


class KnownKeySigner:
    """Signs with an Ed25519 key that others know: implements :class:`Signer` where there are no certificates."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.credential = key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Ed25519."""
        return self._key.sign(message)


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """Trusts one raw Ed25519 key a member."""

    keys: Mapping[str, bytes]

    def verify(self, member: str, credential: bytes, signature: bytes, message: bytes) -> None:
        """See :class:`Verifier`."""
        if self.keys.get(member) != credential:
            raise IntegrityError(f"the key of {member} is not the known one")
        try:
            Ed25519PublicKey.from_public_bytes(credential).verify(signature, message)
        except (InvalidSignature, ValueError) as error:
            raise IntegrityError(f"the signature of {member} is wrong") from error
